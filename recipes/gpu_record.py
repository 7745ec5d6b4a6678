"""What a manifest says of each GPU of a run: which one it was, how it was set, and what else
computed on it.

`recipes.training.devices` fills it in inside the job, `analysis` reads it.  A value that nothing
could tell is None, and a manifest of a CPU run, or of an earlier version of this project, has no
record at all.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from recipes.errors import one_line

Text = Annotated[str, AfterValidator(one_line)]
UNKNOWN = "not recorded"  # stands for the UUID of a GPU that nothing named
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Others(BaseModel):
    """Processes of others that computed on a GPU, and the device memory that they held, in GB of
    1e9 bytes.
    """

    model_config = ConfigDict(strict=True)

    processes: Annotated[int, Field(ge=0)]
    memory_gb: Amount | None = None


class GpuRecord(BaseModel):
    """One GPU of a run.

    `power_limit_w` and `max_sm_clock_mhz` are what the driver enforces.  `others_during` (the most
    that were seen at once) and `power_capped_share` (of samples in which the driver lowered clocks
    to keep the power limit) are known of rank 0's GPU alone.
    """

    model_config = ConfigDict(strict=True)

    rank: Annotated[int, Field(ge=0)]
    uuid: Text | None = None
    name: Text | None = None
    driver: Text | None = None
    power_limit_w: Amount | None = None
    max_sm_clock_mhz: Amount | None = None
    others_at_start: Others | None = None
    others_during: Others | None = None
    others_at_end: Others | None = None
    power_capped_share: Amount | None = None

    @property
    def seen(self) -> list[Others]:
        """What was seen of other processes, each time that somebody looked."""
        return [
            others
            for others in (self.others_at_start, self.others_during, self.others_at_end)
            if others
        ]

    @property
    def shared(self) -> bool | None:
        """Whether another process computed on it at any time that was looked at; None where nobody
        looked.
        """
        return any(others.processes for others in self.seen) if self.seen else None
