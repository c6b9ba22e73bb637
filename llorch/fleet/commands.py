"""Where the command tree finds what reaches machines over ssh: `pool_app`, `model_app`, `worker_app`, `doctor`."""

from __future__ import annotations

from llorch.fleet.doctor_command import doctor
from llorch.fleet.model_commands import model_app
from llorch.fleet.pool_commands import pool_app
from llorch.fleet.worker_commands import worker_app

__all__ = ["doctor", "model_app", "pool_app", "worker_app"]
