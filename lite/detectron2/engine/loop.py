"""The iteration loop and the hooks around it.

A trainer owns `iter`, `start_iter`, `max_iter` and, while it trains, `storage`. Hooks see it through a
weak reference, so that a trainer and its hooks do not keep each other (and the model) alive.
"""

import logging
import weakref
from collections.abc import Mapping

from detectron2.utils.events import EventStorage

logger = logging.getLogger(__name__)


class HookBase:
    """Callbacks around a training step; `self.trainer` is set when the hook is registered.

    Per run: `before_train`, then per iteration `before_step`, `after_backward` (gradients exist, the
    optimizer has not stepped), `after_step`, and at last `after_train`, which also runs after an error.
    A hook with a state returns it from `state_dict` and takes it back in `load_state_dict`.
    """

    trainer: "TrainerBase" = None

    def before_train(self) -> None:
        """Called once, before the first iteration."""

    def after_train(self) -> None:
        """Called once, after the last iteration or after an exception."""

    def before_step(self) -> None:
        """Called before every iteration."""

    def after_backward(self) -> None:
        """Called between the backward pass and the optimizer step."""

    def after_step(self) -> None:
        """Called after every iteration."""

    def state_dict(self) -> dict:
        """What has to survive a restart; empty for a hook without a state."""
        return {}


def _hook_key(hook: HookBase) -> str:
    return type(hook).__qualname__


class TrainerBase:
    """Runs `run_step` from one iteration to another and calls the hooks around it."""

    max_iter: int
    storage: EventStorage

    def __init__(self) -> None:
        self._hooks: list[HookBase] = []
        self.iter = self.start_iter = 0

    def register_hooks(self, hooks: list[HookBase | None]) -> None:
        """Append `hooks` in order; None entries are ignored, so that callers can write conditionals."""
        for hook in filter(None, hooks):
            if not isinstance(hook, HookBase):
                raise TypeError(f"A trainer hook must be a HookBase, got {type(hook).__name__}.")
            hook.trainer = weakref.proxy(self)
            self._hooks.append(hook)

    def train(self, start_iter: int, max_iter: int) -> None:
        """Run the iterations `start_iter` (inclusive) to `max_iter` (exclusive)."""
        logger.info("Training runs from iteration %d to %d", start_iter, max_iter)
        self.iter, self.start_iter, self.max_iter = start_iter, start_iter, max_iter
        with EventStorage(start_iter) as self.storage:
            try:
                self.before_train()
                while self.iter < self.max_iter:
                    self.before_step()
                    self.run_step()
                    self.after_step()
                    self.iter += 1
            except Exception:
                logger.exception("Training stopped by an error in iteration %d:", self.iter)
                raise
            finally:
                self.after_train()

    def _call_hooks(self, event: str) -> None:
        for hook in self._hooks:
            getattr(hook, event)()

    def before_train(self) -> None:
        self._call_hooks("before_train")

    def after_train(self) -> None:
        self.storage.iter = self.iter
        self._call_hooks("after_train")

    def before_step(self) -> None:
        # The storage follows the trainer, hooks and losses that write scalars need no iteration.
        self.storage.iter = self.iter
        self._call_hooks("before_step")

    def after_backward(self) -> None:
        self._call_hooks("after_backward")

    def after_step(self) -> None:
        self._call_hooks("after_step")

    def run_step(self) -> None:
        """One iteration: data, losses, gradients, optimizer."""
        raise NotImplementedError(f"{type(self).__name__} does not define run_step().")

    def state_dict(self) -> dict:
        """`iteration` and, where hooks have a state, `hooks`: {class qualname: state}."""
        state: dict = {"iteration": self.iter}
        hook_states: dict = {}
        for hook in self._hooks:
            content = hook.state_dict()
            # Two hooks of one class cannot be told apart on loading: the first one is stored.
            if content:
                hook_states.setdefault(_hook_key(hook), content)
        if hook_states:
            state["hooks"] = hook_states
        return state

    def load_state_dict(self, state_dict: Mapping) -> None:
        """Restore the iteration and the hooks; the state of a hook that is not registered is skipped."""
        self.iter = state_dict["iteration"]
        registered = {}
        for hook in self._hooks:
            registered.setdefault(_hook_key(hook), hook)
        for name, content in state_dict.get("hooks", {}).items():
            if name in registered:
                registered[name].load_state_dict(content)
            else:
                logger.warning("The state of hook %s is skipped: it is not registered.", name)
