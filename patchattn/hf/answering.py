"""Methods of a model that a patch answers in the model's place, and gives back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any


class Answering:
    """Answers some methods of a model in its place, until that is undone.

    The layers' states hold it, so that a patch can be undone from any module that holds the layers. It does not keep
    the model alive, and in a copy or a pickle of the model it is about that one. Subclasses take the model first, and
    after it what `settings` returns.

    Args:
        model: The model; None if there is none any more.
        **answers: What answers each method; those that the model does not have are left out.
    """

    def __init__(self, model: Any, **answers: Callable[..., Any]) -> None:
        self._model, self.is_undone = None if model is None else weakref.ref(model), False
        self._names = [name for name in answers if hasattr(model, name)]
        for name in self._names:
            vars(model)[name] = answers[name]

    @property
    def model(self) -> Any:
        """The model; None if there is none any more."""
        return None if self._model is None else self._model()

    @property
    def settings(self) -> tuple[Any, ...]:
        """What a copy is made with, beside its model."""
        return ()

    def undo(self) -> None:
        """Give the model its methods back; does nothing the second time."""
        self.is_undone = True
        own = {} if self.model is None else vars(self.model)
        for name in self._names:
            if getattr(own.get(name), "__self__", None) is self:
                own.pop(name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Be about the copy of the model; about none where only a part of the model is copied."""
        return type(self)(memo.get(id(self.model)), *self.settings)

    def __reduce__(self) -> tuple[Any, ...]:
        """Be about the model that comes out of the pickle."""
        return type(self), (self.model, *self.settings)
