"""Ray Train starts the ranks, on this machine or on the cluster it is told of.

    python -m launch.ray_train --ranks 2 -- --task digits --method 3lc

Ray joins the process group itself; what is run is ``launch.train``.
"""

import argparse
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from launch import train

ROOT = Path(__file__).resolve().parents[1]


def loop(config: dict[str, Any]) -> None:
    """Run one rank."""
    train.main(config["arguments"])


def main() -> None:
    """Start the ranks and wait for them."""
    parser = argparse.ArgumentParser(prog="launch.ray_train", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--storage", default=str(ROOT / "checkpoints" / "ray"))
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of launch.train")
    options = parser.parse_args()
    arguments = [argument for argument in options.arguments if argument != "--"]
    # Workers find this clone: on a cluster it lies at the same place on all machines.
    ray.init(runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}})
    TorchTrainer(
        loop,
        train_loop_config={"arguments": arguments},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=options.ranks, use_gpu=False),
        run_config=RunConfig(
            storage_path=options.storage, failure_config=FailureConfig(max_failures=3)
        ),
    ).fit()


if __name__ == "__main__":
    main()
