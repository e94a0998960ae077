"""lm-evaluation-harness: its own evaluator on local tasks, with thinking and without."""
# ruff: noqa: E402

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import config, plain_targets, qwen3
from helpers.tokenizers import ending_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="make test-lm-eval installs the harness")
pytestmark = pytest.mark.filterwarnings("default")

from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string

from forethought import UserError
from forethought.cli import main
from forethought.config import Corpus
from forethought.data.corpus import Window
from forethought.inference import ThinkingModel
from forethought.tools.lm_eval import ForethoughtLM
from helpers.worlds import first_windows

COLOURS = ("red", "blue", "green", "white", "black")
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["red", "blue", "green", "white", "black"]
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" ."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}]
filter_list:
  - {name: stripped, filter: [{function: remove_whitespace}, {function: take_first}]}
""",
    "whole": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}} {{answer}} ."
metric_list: [{metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def one() -> ForethoughtLM:
    return ForethoughtLM("embedded", thoughts=3)


@pytest.fixture(scope="module")
def rows(one: ForethoughtLM) -> list[dict[str, str]]:
    """Held-out documents of the world of cups, up to the colour that tells where the ball is."""
    documents = first_windows(Corpus(path="world:cups/heldout", window=128), one.tokenizer, 0, 40)
    return [row(one, document) for document in documents]


def row(one: ForethoughtLM, document: Window) -> dict[str, str]:
    [answer] = document.marks["answer"]
    text, word = (one.tokenizer.decode(part) for part in (document.tokens[1:answer], [document.tokens[answer]]))
    return {"text": text, "answer": word}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "cups.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    for name, content in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'cups.jsonl'}}}}}\n"
        (folder / f"{name}.yaml").write_text(f"task: cups_{name}\n{source}test_split: test\n{content}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder / "cache"))
        yield folder


def results(tasks: Path, name: str, **arguments: Any) -> dict[str, Any]:
    """What the harness's own evaluator makes of a task."""
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model="forethought",
        model_args={"path": "embedded", **arguments},
        tasks=[f"cups_{name}"],
        task_manager=manager,
        bootstrap_iters=0,
        batch_size=256,
    )
    return found["results"][f"cups_{name}"]


def asked(*arguments: Any) -> Instance:
    return Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0)


def test_thinking_helps_the_base_to_choose(tasks: Path):
    with_thoughts = results(tasks, "choice", thoughts=8)["acc,none"]
    without = results(tasks, "choice", thinking=False)["acc,none"]
    assert without < 0.4
    assert with_thoughts > 0.6


def test_the_same_results_whatever_the_batch(one: ForethoughtLM, rows: list[dict[str, str]]):
    small = ForethoughtLM("embedded", thoughts=3, batch_size=5)
    requests = [asked(row["text"], f" {colour}") for row in rows[:6] for colour in COLOURS]
    scores, again = one.loglikelihood(requests), small.loglikelihood(requests)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in again]
    assert [logp for logp, _ in scores] == pytest.approx([logp for logp, _ in again], abs=1e-4)
    assert small.thinker.config.train.rollout_batch == 5


@torch.no_grad()
def test_a_likelihood_is_the_mean_over_thoughts(one: ForethoughtLM, rows: list[dict[str, str]]):
    text, answer = rows[0]["text"], f" {rows[0]['answer']} ."
    [(logp, _)] = one.loglikelihood([asked(text, answer)])
    context, continuation = one.tok_encode(text), one.tok_encode(answer, add_special_tokens=False)
    told = one.thinker.next_token(context, thoughts=3).thoughts
    form = one.thinker.form
    prompts = [[*form.prompt_tokens(context), *thought.tokens, *form.close] for thought in told]
    chances = [math.exp(float(plain_targets(one.thinker.model, prompt, continuation).sum())) for prompt in prompts]
    assert context[0] == one.tokenizer.bos_token_id
    assert len({tuple(prompt) for prompt in prompts}) > 1
    assert logp == pytest.approx(math.log(sum(chances) / 3), abs=1e-4)
    plain = ForethoughtLM("embedded", thinking=False)
    [(without, _)] = plain.loglikelihood([asked(text, answer)])
    assert without == pytest.approx(float(plain_targets(one.thinker.model, context, continuation).sum()), abs=1e-4)


def test_texts_are_written_behind_a_thought(tasks: Path):
    with_thoughts = results(tasks, "written")["exact_match,stripped"]
    without = results(tasks, "written", thinking=False)["exact_match,stripped"]
    assert without < 0.5 < with_thoughts


def test_repeated_questions_get_thoughts_of_their_own(one: ForethoughtLM, rows: list[dict[str, str]]):
    options = {"until": [" ."], "do_sample": True, "temperature": 1.0, "max_gen_toks": 3}
    requests = [asked(row["text"], options) for row in rows[:10] for _ in range(4)]
    answers = one.generate_until(requests)
    assert any(len(set(answers[4 * i : 4 * i + 4])) > 1 for i in range(10))
    assert answers == one.generate_until(requests)
    assert not any("." in answer or "think" in answer for answer in answers)
    others = ForethoughtLM("embedded", thoughts=3, seed=1).generate_until(requests)
    assert any(answers[4 * i + 1 : 4 * i + 4] != others[4 * i : 4 * i + 3] for i in range(10)), "no sample recurs"


def test_a_thought_may_be_greedy(rows: list[dict[str, str]]):
    """At temperature 0, thought and answer are the same for every seed and repetition."""
    requests = [asked(row["text"], {"until": [" ."], "max_gen_toks": 3}) for row in rows[:5] for _ in range(2)]
    found = [ForethoughtLM("embedded", thought_temperature=0.0, seed=seed).generate_until(requests) for seed in (0, 1)]
    assert found[0] == found[1]
    assert all(found[0][i] == found[0][i + 1] for i in range(0, 10, 2))
    with_a_thought = [reply.answer.thought for reply in found[0]]
    assert all(thought is not None and thought.tokens for thought in with_a_thought)


def test_generation_options_that_mean_nothing_here_are_refused(one: ForethoughtLM):
    with pytest.raises(UserError, match=r"^generation options num_beams: must be among"):
        one.generate_until([asked("ball", {"until": ["."], "num_beams": 4})])
    with pytest.raises(UserError, match=r"^max_gen_toks = 999: must be below"):
        one.generate_until([asked("ball", {"until": ["."], "max_gen_toks": 999})])


def test_whole_texts_are_thought_about_token_by_token(tasks: Path, rows: list[dict[str, str]]):
    thinker = ThinkingModel.load("embedded")
    texts = [f"{row['text']} {row['answer']} ." for row in rows]
    total = sum(thinker.log_likelihood(text, thoughts=2, think_every=4) for text in texts)
    found = results(tasks, "whole", thoughts=2, think_every=4)["bits_per_byte,none"]
    assert found == pytest.approx(-total / sum(len(text.encode()) for text in texts) / math.log(2), rel=1e-4)


def test_it_thinks_where_it_is_unsure(rows: list[dict[str, str]]):
    """A bound between the contexts' entropies; the argument as the harness's command line passes it."""
    text = f"{rows[0]['text']} {rows[0]['answer']} ."
    requests = [asked(text[:end], text[end:]) for end in range(len(text)) if text[end] == " "][:6]
    how = {"until": [" ."], "max_gen_toks": 3}
    plain, always = ForethoughtLM("embedded", thinking=False), ForethoughtLM("embedded", thoughts=2)
    thinker = plain.thinker
    entropies = []
    for one in requests:
        with torch.no_grad():
            logits = thinker.model(torch.tensor([plain.tok_encode(one.args[0])], device=thinker.model.device)).logits
        entropies.append(float(torch.distributions.Categorical(logits=logits[0, -1]).entropy()))
    low, high = sorted(entropies)[2:4]
    bound = (low + high) / 2
    arguments = simple_parse_args_string(f"path=embedded,thoughts=2,think_when=entropy >= {bound}")
    found = ForethoughtLM(**arguments)
    assert high - low > 1e-3
    scores = [one.loglikelihood(requests) for one in (found, always, plain)]
    for value, score, with_thoughts, without in zip(entropies, *scores, strict=True):
        assert score[0] == pytest.approx((with_thoughts if value > bound else without)[0], abs=1e-4)
    answers: Any = found.generate_until([asked(one.args[0], how) for one in requests])
    assert [reply.answer.thought is not None for reply in answers] == [value > bound for value in entropies]
    [whole] = found.loglikelihood_rolling([asked(text)])
    tokens = [found.prefix_token_id, *found.tok_encode(text, add_special_tokens=False)]
    assert whole == pytest.approx(thinker.log_likelihood(tokens, thoughts=2, think_when=f"entropy > {bound}"))
    assert whole != pytest.approx(always.loglikelihood_rolling([asked(text)])[0], abs=1e-4)


def test_rolling_texts_are_thought_about_at_the_temperature_that_is_asked_for():
    text, found = "ball under blue . swap 1 blue red .", ForethoughtLM("embedded", thoughts=2, thought_temperature=0.0)
    tokens = [found.prefix_token_id, *found.tok_encode(text, add_special_tokens=False)]
    [total] = found.loglikelihood_rolling([asked(text)])
    thinker = found.thinker
    assert total == pytest.approx(thinker.log_likelihood(tokens, thoughts=1, thought_temperature=0.0), rel=1e-5)
    assert total != pytest.approx(thinker.log_likelihood(tokens, thoughts=2), abs=1e-4)


def test_a_long_text_goes_through_in_windows():
    one = ForethoughtLM("embedded", thinking=False)
    text = " ".join(["ball under blue ."] * 100)
    [total] = one.loglikelihood_rolling([asked(text)])
    tokens = [one.prefix_token_id, *one.tok_encode(text, add_special_tokens=False)]
    room = one.max_length - 1
    with torch.no_grad():
        wanted = float(plain_targets(one.thinker.model, tokens[:1], tokens[1 : room + 1]).sum())
        wanted += float(plain_targets(one.thinker.model, tokens[-room - 1 : room + 1], tokens[room + 1 :]).sum())
    assert len(tokens) == 401
    assert total == pytest.approx(wanted, rel=1e-5)


def test_long_contexts_lose_their_beginning_and_long_continuations_are_refused(one: ForethoughtLM):
    long = " ".join(["ball under blue ."] * 100)
    [(logp, _)] = one.loglikelihood([asked(long, " ball")])
    assert math.isfinite(logp)
    with pytest.raises(UserError, match=r"^a text of 401 tokens "):
        one.loglikelihood([asked("ball", f" {long}")])


def test_tokens_begin_with_bos_once(one: ForethoughtLM):
    assert one.tok_encode("ball .")[:1] == [one.prefix_token_id] == one.tok_encode("<s> ball .")[:1]
    assert one.tok_encode("<s> ball .").count(one.prefix_token_id) == 1
    [(empty, _)] = one.loglikelihood([asked("", "ball under")])
    assert math.isfinite(empty)


def test_a_context_does_not_end_where_the_tokenizer_ends_documents():
    one = ForethoughtLM(ThinkingModel(qwen3(), ending_tokenizer(), config(thought_length=4)), thinking=False)
    assert one._encode_pair("a b", " c d") == ([2, 5, 6], [7, 8])
    [(logp, _)] = one.loglikelihood([asked("a b", " c d")])
    assert logp == pytest.approx(float(plain_targets(one.thinker.model, [2, 5, 6], [7, 8]).detach().sum()), abs=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thoughts": 0}, "^thoughts = 0"),
        ({"path": "./nothing", "think_when": "entropy"}, "^think_when = 'entropy': must be"),
        ({"method.thought_length": 0}, "^method.thought_length = 0"),
        ({"thought_length": 5}, "^unknown option thought_length; did you mean method.thought_length"),
        ({"path": "./nothing"}, "^model.path = './nothing' cannot be loaded"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        ForethoughtLM(**{"path": "embedded", **options})


def test_the_command_runs_a_task_and_writes_its_results(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = ["lm-eval", "--model_args", "path=embedded,thoughts=2,method.thought_length=12", "--tasks", "cups_choice"]
    words += ["--limit", "5", "--include_path", str(tasks)]
    assert main([*words, "--output_path", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "Tasks" in table, "old versions of pytablewriter lose the headings"
    assert "|cups_choice|" in table
    [file] = (tmp_path / "out").rglob("results_*.json")
    saved = json.loads(file.read_text())
    assert saved["config"]["model"] == "forethought"
    assert 0 <= saved["results"]["cups_choice"]["acc,none"] <= 1


def test_a_users_error_in_the_harness_is_one_line(tasks: Path, capsys: pytest.CaptureFixture[str]):
    words = ["lm-eval", "--model_args", "path=./nothing", "--tasks", "cups_choice", "--include_path", str(tasks)]
    assert main(words) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("forethought: model.path = './nothing' cannot be loaded")
