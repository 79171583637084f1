"""Runs a script under FSDP without a GPU, for which accelerate has none: `sharded_on_cpu.py SCRIPT ARGUMENTS...`."""

import runpy
import sys
from pathlib import Path

from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState


stock = AcceleratorState.__init__


def init(self, *args, fsdp_plugin=None, **kwargs):
    stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


AcceleratorState.__init__ = init
Accelerator.distributed_type = property(lambda self: DistributedType.FSDP)
Accelerator.is_fsdp2 = property(lambda self: True)

sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
