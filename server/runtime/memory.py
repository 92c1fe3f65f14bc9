"""How much memory this process may still take: of the machine, and of the control group that it runs in."""

from __future__ import annotations

from pathlib import Path

from server.errors import OutOfMemory

_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
# A session holds its weights about once, and for a moment, while they are laid out for the processor, up to twice.
_PEAK = 2.0


def available_bytes() -> int | None:
    """Bytes that can be had without swapping or being killed; None where the system does not say."""
    limits = [limit for limit in (_of_machine(), _of_group()) if limit is not None]
    return min(limits) if limits else None


def check_fits(size: int, what: str) -> None:
    """Raises OutOfMemory when a model of `size` bytes cannot be loaded: better refused than ended by the system with all that runs."""
    available = available_bytes()
    if available is not None and size * _PEAK > available:
        raise OutOfMemory(
            f"{what} has {size >> 20} MiB and needs up to twice that while it loads; {available >> 20} MiB are free. "
            "Unload another model, or load it where there is more memory.",
            retry_after_s=10.0,
            needed=int(size * _PEAK),
            available=available,
        )


def _of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None


def _of_group() -> int | None:
    """Of cgroup v2; pages of the file cache that the kernel can drop count as free."""
    try:
        limit = (_GROUP / "memory.max").read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((_GROUP / "memory.current").read_text(encoding="ascii"))
        stats = dict(line.split() for line in (_GROUP / "memory.stat").read_text(encoding="ascii").splitlines())
        return max(0, int(limit) - used + int(stats.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
