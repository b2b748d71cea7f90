"""When texts grow and when the budget for attention falls: by what the model gets right, not by the clock.

Letters: W memory size.
"""

from collections import deque
from dataclasses import asdict, dataclass, field

DENSE, ROUTED = "dense", "routed"


@dataclass
class CurriculumArguments:
    start_length: int = field(
        default=40, metadata={"help": "of the first texts; at most memory_size for attention to see all"}
    )
    open_length: int = field(
        default=0, metadata={"help": "routed: texts grow to this length before the routers take over; 0: start_length"}
    )
    stop_length: int = field(default=4096, metadata={"help": "texts grow up to this"})
    good: float = field(default=0.97, metadata={"help": "accuracy at which texts grow or the budget falls"})
    bad: float = field(default=0.8, metadata={"help": "accuracy below which the budget rises again"})
    window: int = field(default=20, metadata={"help": "steps that an accuracy is averaged over"})
    grow: float = field(default=1.3, metadata={"help": "factor by which texts grow"})
    shrink: float = field(default=0.8, metadata={"help": "factor by which the budget falls"})
    follow: float = field(
        default=1.5, metadata={"help": "the budget falls no further while the rate is above this times it"}
    )
    fill: float = field(
        default=0.5, metadata={"help": "texts grow while a layer keeps at most this share of its memory"}
    )
    spare: float = field(
        default=1.25, metadata={"help": "last budget, in tokens that one layer has to keep for the task"}
    )

    def check(self) -> None:
        """Raises ValueError for values that no run can use."""
        if not 2 <= self.start_length <= self.stop_length:
            raise ValueError(f"start_length {self.start_length} must be from 2 to stop_length {self.stop_length}")
        if self.open_length and not self.start_length <= self.open_length <= self.stop_length:
            raise ValueError(
                f"open_length {self.open_length} must be 0, or from start_length {self.start_length} to stop_length "
                f"{self.stop_length}"
            )
        if not 0 <= self.bad < self.good <= 1:
            raise ValueError(f"bad {self.bad} must be below good {self.good}, both in [0, 1]")
        if self.window < 1 or self.grow <= 1 or not 0 < self.shrink < 1 or self.fill <= 0 or self.spare <= 0:
            raise ValueError(
                f"window {self.window} must be at least 1, grow {self.grow} above 1, shrink {self.shrink} between 0 "
                f"and 1, fill {self.fill} and spare {self.spare} above 0"
            )


class Curriculum:
    """The length of the next texts and the share of their tokens that all layers together may activate.

    A routed model begins with all tokens activated, whatever its routers say. When it answers texts of `open_length`
    right, the routers take over and the budget falls, step by step, each time that the accuracy over a whole window is
    `good`. Once what a layer keeps fills no more than `fill` of its memory, texts grow instead, until it does. Below
    `bad` the budget rises by a step. A model without learned routers has longer texts each time that its accuracy is
    `good`.

    Args:
        memory_size: W; needed: tokens of a text that are worth keeping, as an average over layers, for the last
            budget.

    Attributes:
        length, budget: of the next step; the budget is a share in (0, 1]. phase: `dense` or `routed`.
        done: the last length and budget have been answered right.
    """

    def __init__(self, a: CurriculumArguments, routed: bool, memory_size: int, needed: int):
        self.a, self.routed, self.memory_size, self.needed = a, routed, memory_size, needed
        self.length, self.budget, self.phase, self.done = a.start_length, 1.0, DENSE, False
        self._recent: deque[float] = deque(maxlen=a.window)

    def record(self, accuracy: float, kept: float, rate: float) -> str | None:
        """Takes note of a step: the share of right answers, activated tokens of a text in the busiest layer, and the
        share of tokens that all layers together activate.

        Returns what was changed (`open`, `grow`, `lower`, `raise`, `done`) or None. After a change a whole window has
        to pass again.
        """
        a, recent = self.a, self._recent
        recent.append(accuracy)
        if len(recent) < a.window or self.done:
            return None
        mean = sum(recent) / len(recent)
        change = None
        if mean >= a.good:
            change = self._next(kept, rate)
        elif mean < a.bad and self.phase == ROUTED and self.budget < 1:
            self.budget, change = min(1.0, self.budget / a.shrink), "raise"
        if change is not None:
            recent.clear()
        return change

    def _next(self, kept: float, rate: float) -> str | None:
        a = self.a
        if self.routed and self.phase == DENSE:
            if self.length < a.open_length:
                return self._grow(a.open_length)
            self.phase = ROUTED
            return "open"
        fits = not self.routed or kept <= a.fill * self.memory_size
        if fits and self.length < a.stop_length:
            return self._grow(a.stop_length)
        if self.routed and (not fits or self.budget * self.length > a.spare * self.needed):
            if rate > a.follow * self.budget:
                # The routers have not followed yet.
                return None
            self.budget *= a.shrink
            return "lower"
        self.done = True
        return "done"

    def _grow(self, most: int) -> str:
        self.length = min(most, max(self.length + 1, int(self.length * self.a.grow)))
        return "grow"

    def state_dict(self) -> dict:
        names = ("length", "budget", "phase", "done")
        return {name: getattr(self, name) for name in names} | {
            "recent": list(self._recent),
            "settings": asdict(self.a),
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("length", "budget", "phase", "done"):
            setattr(self, name, state[name])
        self._recent = deque(state["recent"], maxlen=self.a.window)
