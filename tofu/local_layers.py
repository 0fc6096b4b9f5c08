"""Local layers: each client has its own; they are neither sent nor averaged.

With the normalization layers this is FedBN (Li et al., "FedBN: Federated Learning on Non-IID Features via Local Batch
Normalization", ICLR 2021, algorithm 1); with the last layers, a personal head (Arivazhagan et al., "Federated Learning
with Personalization Layers", arXiv 1912.00818).
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from tofu.errors import SettingError
from tofu.settings.fields import comma_list
from tofu.weights import Weights, load_weights


class LocalLayers:
    """The local tensors of a model: those whose state-dict names match a pattern.

    The constructor marks them: the parameters no longer require a gradient and the buffers are no longer in the state
    dict, so codec, server and secure sums do not include them.

    Args:
        model: at its initial weights; changed in place.
        patterns: shell-style (`fnmatch`), separated by commas, such as "*.bn*.*, head.*"; empty for none.

    Raises:
        SettingError: a pattern matches nothing, or no trainable parameter is left.
    """

    def __init__(self, model: nn.Module, patterns: str) -> None:
        wanted = comma_list(patterns)
        names = list(model.state_dict())
        for pattern in wanted:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise SettingError(
                    "local_layers", pattern, f"a pattern that matches one of {', '.join(names[:8])}, ..."
                )
        matched = [name for name in names if any(fnmatchcase(name, pattern) for pattern in wanted)]
        parameters = dict(model.named_parameters())
        self._trainable = [name for name in matched if name in parameters and parameters[name].requires_grad]
        if wanted and not any(p.requires_grad for name, p in parameters.items() if name not in self._trainable):
            raise SettingError("local_layers", patterns, "patterns that leave at least one parameter to the federation")
        buffers = [name for name in matched if name not in parameters]
        for name in buffers:
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            module.register_buffer(leaf, module.get_buffer(leaf), persistent=False)
        self._names = [*self._trainable, *buffers]
        self._initial = self._values(model)
        self._require_grad(model, False)

    def __bool__(self) -> bool:
        return bool(self._names)

    def without(self, tensors: Mapping[str, Tensor]) -> Weights:
        """Return the tensors that are not local."""
        return {name: value for name, value in tensors.items() if name not in self._names}

    def begin(self, model: nn.Module, own: Mapping[str, Tensor]) -> None:
        """Load this client's own values, if there are any, and make the parameters trainable."""
        load_weights(model, {name: own[name] for name in self._names if name in own})
        self._require_grad(model, True)

    def end(self, model: nn.Module) -> Weights:
        """Return this client's values, and restore the initial ones in the model."""
        own = self._values(model)
        load_weights(model, self._initial)
        self._require_grad(model, False)
        return own

    def read(self, data: object) -> Weights:
        """Return the values that `write` stored; empty if they are missing or of another model."""
        if not isinstance(data, bytes):
            return {}
        try:
            own: Weights = safetensors.torch.load(data)
        except SafetensorError:
            return {}
        same = own.keys() == self._initial.keys() and all(own[n].shape == v.shape for n, v in self._initial.items())
        return own if same else {}

    @staticmethod
    def write(own: Weights) -> bytes:
        """Return a client's values as bytes."""
        return safetensors.torch.save({name: value.contiguous() for name, value in own.items()})

    def _values(self, model: nn.Module) -> Weights:
        tensors: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
        return {name: tensors[name].detach().clone() for name in self._names}

    def _require_grad(self, model: nn.Module, wanted: bool) -> None:
        parameters = dict(model.named_parameters())
        for name in self._trainable:
            parameters[name].requires_grad_(wanted)
            if not wanted:
                parameters[name].grad = None


@torch.no_grad()
def keep_local(model: nn.Module, patterns: str) -> nn.Module:
    """Mark the local layers of the server's model."""
    LocalLayers(model, patterns)
    return model
