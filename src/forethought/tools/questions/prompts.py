"""What a model reads before it answers: worked examples, the question, `Answer:`. The same for every model.

With thinking the prompt is the same to the letter, and the model thinks between its delimiters before the answer:

    Question: ...          Question: ...
    Answer:                Answer:<think> c </think>
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forethought.tools.questions.answers import LETTERS
from forethought.tools.questions.tasks import Question, Task

STOPS = ("\nQuestion:",)  # where a model has begun to write the next question


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A worked example: the steps, and the answer as it is to be written."""

    question: str
    steps: str
    answer: str


_WORDS = (
    Exemplar(
        "A baker fills 6 trays with 12 rolls each and sells 50 rolls. How many rolls are left?",
        "The trays hold 6 * 12 = 72 rolls. After the sale 72 - 50 = 22 rolls are left.",
        "22",
    ),
    Exemplar(
        "Mira has 15 stamps. Each of her 3 cousins gives her 4 more. How many stamps does she have now?",
        "The cousins give her 3 * 4 = 12 stamps. Now she has 15 + 12 = 27 stamps.",
        "27",
    ),
    Exemplar(
        "A train ticket costs $8, and a child pays half. How many dollars do 2 adults and 3 children pay?",
        "A child pays 8 / 2 = 4 dollars. Adults pay 2 * 8 = 16 and children 3 * 4 = 12. Together that is 16 + 12 = 28.",
        "28",
    ),
    Exemplar(
        "Tom reads 20 pages a day for 5 days and 35 pages on each of the next 2 days. How many pages has he read?",
        "In the first days he reads 5 * 20 = 100 pages, then 2 * 35 = 70 pages. That makes 100 + 70 = 170 pages.",
        "170",
    ),
    Exemplar(
        "A tank for 240 litres is one third full. Then 45 litres are added. How many more litres fit in?",
        "At first it holds 240 / 3 = 80 litres, then 80 + 45 = 125. There is room for 240 - 125 = 115 more.",
        "115",
    ),
    Exemplar(
        "Lena is 4 years older than twice the age of Finn, who is 9. How old is Lena?",
        "Twice the age of Finn is 2 * 9 = 18. Lena is 18 + 4 = 22.",
        "22",
    ),
    Exemplar(
        "A shop lowers the price of a $60 coat by 25%. How many dollars does the coat cost now?",
        "The price falls by 60 * 25 / 100 = 15 dollars. The coat costs 60 - 15 = 45 dollars.",
        "45",
    ),
    Exemplar(
        "Three friends share 2 pizzas of 9 slices each equally. How many slices does each of them get?",
        "There are 2 * 9 = 18 slices. Each friend gets 18 / 3 = 6.",
        "6",
    ),
)
_CONTEST = (
    Exemplar("If $3x - 7 = 11$, what is $x^2$?", "Then $3x = 18$, so $x = 6$ and $x^2 = 36$.", r"$\boxed{36}$"),
    Exemplar(
        "What is the probability that two fair dice show a sum of 9?",
        r"The pairs are $(3,6), (4,5), (5,4), (6,3)$: 4 of 36, which is $\frac{4}{36} = \frac{1}{9}$.",
        r"$\boxed{\frac{1}{9}}$",
    ),
    Exemplar(
        "Find the area of the triangle with vertices $(0,0)$, $(6,0)$ and $(2,5)$.",
        r"Its base is 6 and its height 5, so its area is $\frac{1}{2} \cdot 6 \cdot 5 = 15$.",
        r"$\boxed{15}$",
    ),
    Exemplar(
        "What is the remainder when $7^{10}$ is divided by $5$?",
        r"Modulo 5 we have $7 \equiv 2$, and $2^{10} = 1024 \equiv 4$.",
        r"$\boxed{4}$",
    ),
)
_QUANTITIES = (
    Exemplar(
        "A cart of mass 2 kg moves at 3 m/s. What is its kinetic energy, in joules?",
        r"$E = \frac{1}{2} m v^2 = \frac{1}{2} \cdot 2 \cdot 3^2 = 9$.",
        r"$\boxed{9}$",
    ),
    Exemplar(
        "A resistor of 50 ohms carries a current of 0.2 A. Which voltage lies across it, in volts?",
        r"$U = R I = 50 \cdot 0.2 = 10$.",
        r"$\boxed{10}$",
    ),
    Exemplar(
        r"How many seconds does light, at $3.0 \times 10^8$ m/s, take for $1.5 \times 10^{11}$ m?",
        r"$t = \frac{1.5 \times 10^{11}}{3.0 \times 10^8} = 0.5 \times 10^3 = 500$.",
        r"$\boxed{500}$",
    ),
    Exemplar(
        "A radioactive sample falls to a quarter of its nuclei in 16 days. What is its half-life, in days?",
        "A quarter is two halvings, so one takes $16 / 2 = 8$ days.",
        r"$\boxed{8}$",
    ),
)
EXEMPLARS: dict[str, tuple[Exemplar, ...]] = {"words": _WORDS, "contest": _CONTEST, "quantities": _QUANTITIES}

CHOICES = (
    Question(
        id="charge",
        text="Which of these particles carries a negative charge?",
        choices=("the proton", "the neutron", "the electron", "the photon"),
        answer="C",
    ),
    Question(
        id="speed",
        text="A car drives 90 km in an hour and a half. What is its average speed?",
        choices=("45 km/h", "60 km/h", "75 km/h", "135 km/h"),
        answer="B",
    ),
    Question(
        id="light",
        text="Which part of a plant cell takes in the light for photosynthesis?",
        choices=("the chloroplast", "the nucleus", "the ribosome", "the cell wall"),
        answer="A",
    ),
    Question(
        id="pressure",
        text="A gas in a closed rigid vessel is heated. What happens to its pressure?",
        choices=("It falls.", "It stays the same.", "It rises, then falls.", "It rises."),
        answer="D",
    ),
)

Examples = Mapping[str, Sequence[Question]]  # worked examples of a task's own file, by subject


def prompt(task: Task, question: Question, shots: int, examples: Examples) -> str:
    """Up to `shots` worked examples and the question, ending in `Answer:`; a choice lists its lettered choices.

    Examples come from the task's own file where it has some for the question's subject, else from this module; where
    there are fewer than `shots`, all of them are used.
    """
    if task.kind == "written":
        before = [
            f"Question: {one.question}\nAnswer: {one.steps} The answer is {one.answer}."
            for one in EXEMPLARS[task.exemplars][:shots]
        ]
        return "\n\n".join([*before, f"Question: {question.text}\nAnswer:"])
    before = [f"{_lettered(one)} {one.answer}" for one in _worked(question, examples)[:shots]]
    return "\n\n".join([*before, _lettered(question)])


def cloze(question: Question, shots: int, examples: Examples) -> str:
    """A question without its choices, ending in `Answer:`, after examples answered in words: to score each choice."""
    before = [f"{_bare(one)} {one.choices[LETTERS.index(one.answer)]}" for one in _worked(question, examples)[:shots]]
    return "\n\n".join([*before, _bare(question)])


def _worked(question: Question, examples: Examples) -> Sequence[Question]:
    return examples.get(question.subject) or CHOICES


def _lettered(question: Question) -> str:
    choices = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)]
    return "\n".join([f"Question: {question.text}", *choices, "Answer:"])


def _bare(question: Question) -> str:
    return f"Question: {question.text}\nAnswer:"
