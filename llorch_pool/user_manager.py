"""Whether systemd's user manager can look after this user's processes here. Containers and cron have none."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path


def lingering() -> bool:
    """Whether this user's service manager outlives logins (`loginctl enable-linger`)."""
    return (Path("/var/lib/systemd/linger") / pwd.getpwuid(os.getuid()).pw_name).exists()


def user_manager_answers() -> bool:
    """Whether `systemctl --user` works here: not in containers, nor without a user bus."""
    systemctl = shutil.which("systemctl")
    if systemctl is None:
        return False
    try:
        done = subprocess.run([systemctl, "--user", "show", "--property=Version"], capture_output=True, timeout=3)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0
