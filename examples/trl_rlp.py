"""Train RLP with an unmodified TRL GRPOTrainer on the embedded world, in about a minute on one core.

pip install 'forethought[trl]'
python examples/trl_rlp.py
"""

import sys

from trl import GRPOTrainer

import forethought
from forethought.tools import trl

options = "--train.steps 40 --train.batch 16 --train.checkpoint_every 1000 --train.log_every 5 --model.device cpu"
config = forethought.load("quickstart", [*options.split(), *sys.argv[1:]])

# model, reward_funcs, args, train_dataset, processing_class, callbacks
parts = trl.parts(config, "runs/trl/checkpoints")
trainer = GRPOTrainer(**parts)
trainer.train()
for line in trainer.state.log_history:
    if "gain" in line:
        print(f"step {line['step']:3}: information gain {line['gain']:6.3f} nats, {line['closed']:.0%} thoughts closed")

trl.save(parts["reward_funcs"], "runs/trl/policy")
for model in ("embedded", "runs/trl/policy"):
    overrides = {"model": {"path": model}, "run": f"runs/trl/{model.replace('/', '-')}", "overwrite": True}
    overrides["evaluate"] = {"documents": 100, "positions": 1, "view": 0}
    figures, _ = forethought.evaluate("embedded", overrides)
    print(f"{model}: accuracy at the answer with a thought {figures['answer/accuracy_think']:.1%}")
