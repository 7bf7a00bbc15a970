"""What belongs to the process that made it."""

from __future__ import annotations

from typing import Any, NoReturn, Self, SupportsIndex

from viasd_calib.errors import ModelError


class InProcess:
    """Refuses to be pickled or deeply copied; a shallow copy shares all there is.

    Weights may lie in an order that the machine's kernels alone can read, under numbers and locks of one process.

    Example:
        >>> import copy
        >>> class Opened(InProcess): ...
        >>> try:
        ...     copy.deepcopy(Opened())
        ... except ModelError as error:
        ...     print(str(error).partition(":")[0])
        Opened cannot be pickled or copied
    """

    def __copy__(self) -> Self:
        alike = object.__new__(type(self))
        alike.__dict__.update(self.__dict__)
        return alike

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise ModelError(
            f"{type(self).__name__} cannot be pickled or copied: all threads of a process can use one, and each "
            "process loads its own; give it the path of the spec, and call load_engine there"
        )


class Unsaved(InProcess):
    """The same for a module whose weights are no tensors that could be saved: ``state_dict`` refuses too."""

    def _save_to_state_dict(self, *_: Any) -> NoReturn:
        raise ModelError(
            f"the weights of a {type(self).__name__} cannot be saved; load the model anew with backend eager, "
            "without quantize or offload, and save that"
        )
