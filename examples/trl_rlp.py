"""RLP inside TRL: an unmodified GRPOTrainer learns to think on the embedded world, in about a minute on one core.

pip install 'forethought[trl]'
python examples/trl_rlp.py
"""

import sys

from trl import GRPOTrainer

import forethought
from forethought.tools import trl

options = "--train.steps 40 --train.batch 16 --train.checkpoint_every 1000 --train.log_every 5 --model.device cpu"
config = forethought.load("quickstart", [*options.split(), *sys.argv[1:]])

parts = trl.parts(
    config, "runs/trl/checkpoints"
)  # model, reward_funcs, args, train_dataset, processing_class, callbacks
trainer = GRPOTrainer(**parts)
trainer.train()
for line in trainer.state.log_history:
    if "gain" in line:
        print(
            f"step {line['step']:3}: information gain {line['gain']:6.3f} nats, {line['closed']:.0%} of thoughts close"
        )

trl.save(parts["reward_funcs"], "runs/trl/policy")
for model in ("embedded", "runs/trl/policy"):
    overrides = {"model": {"path": model}, "run": f"runs/trl/{model.replace('/', '-')}", "overwrite": True}
    figures, _ = forethought.evaluate(
        "embedded", overrides | {"evaluate": {"documents": 100, "positions": 1, "view": 0}}
    )
    print(f"{model}: {figures['answer/accuracy_think']:.1%} right at the answer, thinking")
