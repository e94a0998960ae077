"""Options: what is refused, in which words, and what survives a round trip."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from forethought.config import (
    Config,
    Method,
    UserError,
    find,
    from_dict,
    load,
    option_names,
    own_options,
    shipped,
    to_dict,
)
from forethought.run.folder import RunLog
from forethought.tools import think

OPTIONS = """
seed run overwrite
model.path model.tokenizer model.init model.precision model.device model.prefix model.decoding
corpus.path corpus.field corpus.domain_field corpus.language_field corpus.split corpus.window corpus.min_tokens
corpus.shuffle corpus.skip_bad_rows
method.name method.group method.thought_length method.positions method.position_policy method.marked_share
method.min_entropy method.proxy method.prediction_length method.end
method.horizon method.discount method.temperature method.top_p method.reward method.baseline method.scale
method.clamp_gain method.min_gain method.clip_low method.clip_high method.inner_steps method.ema
method.teacher_every method.freeze_teacher method.prediction_weight method.distillation method.warmup_steps
method.length_norm method.allow_empty method.min_thought_length method.repeat_context method.kl_weight method.unclosed
method.unclosed_penalty method.open method.close method.prompt
rollout.engine rollout.precision rollout.cache_gb rollout.timeout_s rollout.importance_cap
optim.learning_rate optim.schedule optim.warmup optim.weight_decay optim.beta1 optim.beta2 optim.gradient_clip
lora.r lora.alpha lora.target_modules
train.steps train.tokens train.flops train.batch train.rollout_batch train.log_every train.log_thoughts
train.checkpoint_every train.keep_checkpoints train.tracker
update.tokens_per_chunk update.checkpointing update.compile update.attention update.offload
parallel.shard parallel.timeout_s
evaluate.path evaluate.documents evaluate.positions evaluate.thoughts evaluate.view evaluate.view_thoughts
questions.tasks questions.data questions.shots questions.samples questions.thinking questions.max_tokens
questions.temperature questions.limit questions.batch
"""


def refused(overrides: str | list[str]) -> str:
    words = overrides.split(" ") if isinstance(overrides, str) else overrides
    with pytest.raises(UserError) as error:
        load(None, words)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_the_options_are_these():
    """A new option is a decision: add it here, to its page in docs/ and to the changelog."""
    assert option_names() == OPTIONS.split()


@pytest.mark.parametrize(
    ("overrides", "allowed"),
    [
        ("--seed -1", "greater than or equal to 0"),
        ("--questions.tasks []", "at least 1 item"),
        ("--questions.tasks 3", "valid array"),
        ("--questions.temperature 0", "greater than 0"),
        ("--questions.thinking maybe", "'with', 'without' or 'both'"),
        ("--model.precision fp16", "'fp32' or 'bf16'"),
        ("--model.prefix copied", "'shared' or 'replicated'"),
        ("--corpus.window 1", "greater than or equal to 2"),
        ("--corpus.shuffle -1", "greater than or equal to 0"),
        ("--corpus.shuffle 1000000000000000000000", "less than 9223372036854775808"),
        ("--evaluate.documents 1000000000000000000000", "less than 9223372036854775808"),
        ("--rollout.engine sglang", "must be native, vllm or module:attribute"),
        ("--rollout.cache_gb 0", "greater than 0"),
        ("--rollout.timeout_s inf", "finite number"),
        ("--rollout.importance_cap -1", "greater than or equal to 0"),
        ("--method.group 0", "greater than or equal to 1"),
        ("--method.group 1", "at least 2"),
        ("--method.group 2.5", "integer"),
        ("--method.group eight", "integer"),
        (f"--method.group {'1' * 5000}", "method.group = "),
        (f"--method.group {'[' * 3000}", "integer"),
        ("--method.thought_length 0", "greater than or equal to 1"),
        ("--method.positions 0", "greater than or equal to 1"),
        ("--method.ema 0", "greater than 0"),
        ("--method.ema 1", "less than 1"),
        ("--method.temperature 0", "greater than 0"),
        ("--method.temperature nan", "finite number"),
        ("--method.temperature inf", "finite number"),
        ("--method.top_p 0", "greater than 0"),
        ("--method.top_p 1.5", "less than or equal to 1"),
        ("--method.discount -0.1", "greater than or equal to 0"),
        ("--method.min_gain inf", "below infinity"),
        ("--method.min_gain nan", "below infinity"),
        ("--method.clip_low 1.1", "less than or equal to 1"),
        ("--method.clamp_gain perhaps", "boolean"),
        ("--method.name grpo", "must be rlp, warmup, rpt, cpt, mixed or module:attribute"),
        ("--optim.learning_rate -1e-6", "greater than 0"),
        ("--optim.learning_rate nan", "finite number"),
        ("--optim.learning_rate inf", "finite number"),
        ("--optim.beta2 1", "less than 1"),
        ("--optim.gradient_clip -1", "greater than or equal to 0"),
        ("--train.steps 0", "greater than or equal to 1"),
        ("--train.rollout_batch -1", "greater than or equal to 0"),
        ("--update.tokens_per_chunk -1", "greater than or equal to 0"),
        ("--train.keep_checkpoints 0", "greater than or equal to 1"),
        ("--train.tracker neptune", "'tensorboard'"),
        ("--evaluate.documents 0", "greater than or equal to 1"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(overrides: str, allowed: str):
    option, value = overrides.removeprefix("--").split()
    message = refused(overrides)
    assert message.startswith(f"{option} = ")
    assert value in message or str(float(value)) in message
    assert allowed in message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ("--method.scale std --method.baseline batch", "method.baseline = 'batch'"),
        ("--method.teacher_every 0 --method.clamp_gain True", "method.teacher_every = 0"),
        ("--method.teacher_every 2 --method.baseline none", "method.teacher_every = 2"),
        ("--method.teacher_every 2 --method.min_gain 0", "method.teacher_every = 2"),
        ("--train.batch 7 --method.positions 2", "train.batch = 7"),
        ("--method.prompt think", "method.prompt = 'think'"),
        ("--method.prompt {context}{context}", "method.prompt = '{context}{context}'"),
        ("--rollout.engine vllm --method.name rpt", "rollout.engine = 'vllm'"),
        ("--rollout.engine vllm --method.top_p 0.9", "rollout.engine = 'vllm'"),
        ("--corpus.window 4", "corpus.min_tokens = 8"),
        ("--method.horizon 8", "corpus.min_tokens = 8"),
        ("--method.horizon 8 --method.name cpt", "corpus.min_tokens = 8"),
        ("--model.prefix replicated --update.compile True", "model.prefix = 'replicated'"),
        ("--model.prefix replicated --update.attention triton", "model.prefix = 'replicated'"),
    ],
)
def test_options_that_do_not_fit_each_other_are_refused(overrides: str, named: str):
    assert refused(overrides).startswith(f"{named}: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--metod.group 8", "unknown option metod; did you mean method?"),
        ("--method.groop 8", "unknown option method.groop; did you mean method.group?"),
        ("--xyzzy 8", "unknown option xyzzy; see forethought train --help"),
        ("--method.group", "option --method.group needs a value"),
        ("method.group 8", "expected an option such as --method.group 8, got 'method.group'"),
        ("--method 8", "method = 8: "),
        ("--method.group.more 8", "method.group = "),
        ("--method 8 --method.group 3", "method = 8: is no table of options"),
        ("-x 8", "expected an option such as --method.group 8, got '-x'"),
        ("-- 8", "unknown option"),
    ],
)
def test_malformed_overrides_are_refused(overrides: str, message: str):
    assert message.rstrip() in refused(overrides)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[method]\ngroop = 8", "unknown option method.groop; did you mean method.group?"),
        ("[metod]\ngroup = 8", "unknown option metod"),
        ("[method]\ngroup = '8'", "method.group = '8': input should be a valid integer"),
        ("[method]\ngroup = true", "method.group = True: input should be a valid integer"),
        ("[method]\nclamp_gain = 1", "method.clamp_gain = 1: input should be a valid boolean"),
        ("[model]\npath = 3", "model.path = 3: input should be a valid string"),
        ("model = 3", "model = 3: "),
        ("seed = 2026-01-01", "seed = '2026-01-01': input should be a valid integer"),
        ("[method\ngroup = 8", "is not valid TOML: "),
        ("seed = 1\nseed = 2", "is not valid TOML: "),
        ("[model]\npath = ''", "model.path = '': string should have at least 1 character"),
    ],
)
def test_a_wrong_config_file_is_explained_in_a_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(UserError) as error:
        load(tmp_path / "c.toml")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_option_of_what_is_no_table_does_not_take_its_place(tmp_path: Path):
    (tmp_path / "c.toml").write_text("method = 3")
    with pytest.raises(UserError, match="method = 3: is no table of options"):
        load(tmp_path / "c.toml", ["--method.group", "8"])


def test_a_config_that_is_no_text_file_is_refused(tmp_path: Path):
    (tmp_path / "binary.toml").write_bytes(b"\xff\x00\xfe")
    with pytest.raises(UserError, match=r"binary.toml' is not valid TOML: "):
        load(tmp_path / "binary.toml")
    for name in (tmp_path, tmp_path / "missing.toml", "missing"):
        with pytest.raises(UserError, match=r"^config '.*' is no file; shipped configs are "):
            load(name)


def test_a_config_file_that_may_not_be_read_is_refused(tmp_path: Path):
    path = tmp_path / "c.toml"
    path.symlink_to("/proc/self/mem")
    if not path.is_file():
        pytest.skip("no /proc here")
    with pytest.raises(UserError, match=r"^config .* cannot be read: "):
        load(path)


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path):
    (tmp_path / "c.toml").write_text("seed = 3\n[method]\ngroup = 4\nthought_length = 5\n")
    config = load(
        tmp_path / "c.toml", ["--method.group", "6", "--optim.learning-rate=1e-3", "--method.clamp_gain", "True"]
    )
    assert (config.seed, config.method.group, config.method.thought_length) == (3, 6, 5)
    assert (config.optim.learning_rate, config.method.clamp_gain, config.method.top_p) == (1e-3, True, 1.0)


@pytest.mark.parametrize("text", ["123", "true", "1e3", "[red]", "-5", "'quoted'", "a=b"])
def test_text_options_take_their_text_as_it_is(text: str):
    assert load(None, [f"--model.path={text}", "--method.open", text, "--run", text]).model.path == text
    assert load(None, ["--method.open", text]).method.open == text
    assert own_options(think.Options, [f"--html={text}", "--json"]) == (think.Options(html=text, json=True), {})


def test_every_shipped_config_loads():
    files = list(shipped().glob("*.toml"))
    assert files
    for path in files:
        if not path.stem.startswith(("compare-", "sweep-", "sft-", "rlvr-")):
            assert load(path.stem) == load(path)
        assert find(path.name) == path


@pytest.mark.parametrize(
    "method", [Method(), Method(min_gain=-1.5), Method(min_gain=-math.inf, open="[red]\x1b\u2028")]
)
def test_a_config_survives_its_run_folder(tmp_path: Path, method: Method):
    config = Config(seed=2**40, run=str(tmp_path / "run"), method=method)
    assert from_dict(to_dict(config)) == config
    run = RunLog.create(config)
    assert run.config() == config
    json.loads((run.path / "config.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"clamp_gain": True}, False), ({"baseline": "batch"}, False), ({"min_gain": 0.0}, False)],
)
def test_shift_invariance(changes: dict[str, object], expected: bool):
    config = from_dict({"method": changes})
    assert config.shift_invariant is expected


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().seed = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_options_are_checked_without_torch():
    code = (
        "import sys\nfrom forethought.cli import main\nstatus = main(['train', 'quickstart', '--method.ema', '1'])\n"
        "sys.exit(100 if {'torch', 'transformers', 'tyro'} & set(sys.modules) else status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "forethought: method.ema = 1: input should be less than 1\n"


def test_a_config_file_may_begin_with_a_byte_order_mark_and_have_crlf(tmp_path: Path):
    (tmp_path / "c.toml").write_bytes(b'\xef\xbb\xbfrun = "runs/x"\r\n\r\n[train]\r\nsteps = 7\r\n')
    assert load(tmp_path / "c.toml").train.steps == 7
