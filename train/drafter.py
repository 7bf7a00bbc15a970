"""Train a shallow drafter with Lightning.

python train/drafter.py fit --config configs/drafter/smollm2-135m.yaml
"""

from lightning.pytorch.cli import LightningCLI

from viasd_calib.host_memory import keep_freed_memory
from viasd_calib.traces.data import TraceDataModule
from viasd_calib.training.drafter import DrafterModule
from viasd_calib.training.lightning_output import quiet_lightning

if __name__ == "__main__":
    keep_freed_memory()
    quiet_lightning()
    LightningCLI(DrafterModule, TraceDataModule, seed_everything_default=0)
