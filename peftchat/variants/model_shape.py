"""Names and sizes of a base model's layers, on which the settings of a variant depend."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from peftchat.errors import UserError

_FUSED_PARTS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
"""Layers of an expert that transformers 5 joins -> the parameter that holds both."""

_ONE_EXPERT_PARTS = {**_FUSED_PARTS, "down_proj": "down_proj", "w2": "down_proj"}


@dataclass(frozen=True)
class Targets:
    """What gets an adapter, as PEFT's config names it.

    Attributes:
        modules: PEFT's `target_modules`.
        parameters: PEFT's `target_parameters`: weights of fused experts, of routers that the recipe names, and of
            linear layers whose names PEFT would take for experts.
    """

    modules: str | list[str]
    parameters: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelShape:
    """Names and sizes of the base's layers.

    Attributes:
        model_type: the architecture's name in transformers.
        hidden_size: width of the residual stream.
        num_layers: number of decoder layers.
        linear: dotted name of each linear layer except the LM head -> (inputs, outputs).
        norms: dotted names of the normalization layers that have weights.
        is_conv1d: whether the linear layers store their weights as (inputs, outputs), as GPT-2's Conv1D does.
        experts: dotted name of each parameter that holds one layer of all experts of a block -> its shape.
        routers: dotted names of the modules that choose among experts, linear layers or not.
        renamed: last parts of names that PEFT's LoRA takes for those of experts, and replaces.
        flat_experts: parameters that hold all experts without a dimension of their own, which PEFT cannot adapt.
        not_called: dotted names of linear layers of which the model reads the weight, as the kernels of Mamba do. An
            adapter wraps the call of a layer, so it would have no effect on them.
        elsewhere: dotted names of the linear and normalization layers that text does not pass, such as those of a
            vision tower. They are in none of the fields above.
        modules: dotted names of all modules.
    """

    model_type: str
    hidden_size: int
    num_layers: int
    linear: Mapping[str, tuple[int, int]]
    norms: tuple[str, ...]
    is_conv1d: bool
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    routers: tuple[str, ...] = ()
    renamed: frozenset[str] = frozenset()
    flat_experts: tuple[str, ...] = ()
    not_called: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()

    @property
    def _is_plain(self) -> bool:
        """Whether PEFT's own names of layers choose the right ones: there are no experts, and each layer is called."""
        return not (self.experts or self.routers or self.renamed or self.not_called or self.elsewhere)

    def short_names(self, names: Iterable[str], *, parts: int = 2) -> list[str]:
        """Return the last parts of dotted names, each once, as PEFT matches them.

        Where the same parts name a layer that text does not pass, there are as many more as tell the two apart.
        """
        return list(dict.fromkeys(self._short_name(name.split("."), parts) for name in names))

    def _short_name(self, name: list[str], parts: int) -> str:
        short = ".".join(name[-parts:])
        if parts < len(name) and any(is_target(other, short) for other in self.elsewhere):
            return self._short_name(name, parts + 1)
        return short

    def target_module_names(self, group: str) -> list[str]:
        """Return the last two parts of the names of a group of linear layers, as PEFT matches them.

        Args:
            group: `attention`, `feed-forward` or `all-linear`.

        Raises:
            UserError: the model has no such layers.
        """
        names = [
            name
            for name in self.linear
            if name not in self.routers
            and name not in self.not_called
            and (group == "all-linear" or (group == "attention") == in_attention(name))
        ]
        if not names and not (self.experts and group != "attention"):
            raise UserError(
                f"this model has no linear layers of the group `{group}`",
                where="adapter.target_modules",
                hint="Write `all-linear`, or the names of the layers.",
            )
        return self.short_names(names)

    def peft_targets(self, modules: str | tuple[str, ...]) -> Targets:
        """Return PEFT's names of the layers that a setting of that name chooses.

        Groups contain the experts, and never what chooses among them.

        Raises:
            UserError: the model has no layers of the group or name, or a name is one half of a fused parameter.
        """
        if isinstance(modules, str):
            if modules != "attention" and self.flat_experts:
                raise UserError(
                    f"PEFT cannot adapt `{self.flat_experts[0]}` of this `{self.model_type}`: it holds all experts "
                    "without a dimension for them",
                    where=f"adapter.target_modules: {modules}",
                    hint="Use method: full. To leave the experts frozen, set target_modules: attention.",
                )
            if self._is_plain:
                return Targets("all-linear" if modules == "all-linear" else self.target_module_names(modules))
            experts = () if modules == "attention" else self.short_names(self.experts, parts=3)
            return Targets(self.target_module_names(modules), tuple(experts))
        if self._is_plain:
            self._check_known(modules)
            return Targets(list(modules))
        self._check_called(modules)
        _check_halves(modules, self)
        layers: list[str] = []
        parameters: list[str] = []
        for name in modules:
            found = self._parameters_named(name)
            parameters += found
            matched = [layer for layer in self.linear if is_target(layer, name)]
            if matched:
                is_elsewhere = any(is_target(layer, name) for layer in self.elsewhere)
                layers += self.short_names(matched) if is_elsewhere else [name]
            elif not found:
                known = [*self.target_module_names("all-linear"), *self.short_names(self.experts)]
                raise self._unknown_name(name, "layer, and no parameter of experts,", known)
        return Targets(layers, tuple(dict.fromkeys(parameters)))

    def _check_known(self, names: Iterable[str]) -> None:
        """Raise a UserError for a name of no module: PEFT skips it as long as another name fits."""
        for name in names:
            if not any(is_target(module, name) for module in self.modules):
                raise self._unknown_name(name, "layer", self.short_names(self.linear, parts=1))

    def _unknown_name(self, name: str, what: str, known: Iterable[str]) -> UserError:
        return UserError(
            f"this `{self.model_type}` has no {what} with the name `{name}`",
            where="adapter.target_modules",
            hint=f"It has {', '.join(known)}.",
        )

    def _check_called(self, modules: Iterable[str]) -> None:
        """Raise a UserError for a name of layers on which an adapter would have no effect."""
        for name in modules:
            if any(is_target(layer, name) for layer in self.not_called):
                raise UserError(
                    f"an adapter on `{name}` would have no effect: this `{self.model_type}` reads the layer's weight "
                    "without calling the layer",
                    where="adapter.target_modules",
                    hint=f"It can adapt {', '.join(self.target_module_names('all-linear'))}.",
                )

    def _parameters_named(self, name: str) -> list[str]:
        """Return the parameters of experts and routers that a name of `target_modules` chooses."""
        fused = _ONE_EXPERT_PARTS.get(name, name)
        experts = [
            parameter
            for parameter in self.experts
            if is_target(parameter, fused) or is_target(parameter.rpartition(".")[0], name)
        ]
        routers = [
            f"{router}.weight"
            for router in self.routers
            if router not in self.linear and (is_target(router, name) or is_target(f"{router}.weight", name))
        ]
        return self.short_names([*experts, *routers], parts=3)

    def without_renamed(self, targets: Targets) -> Targets:
        """Return the targets with linear layers as parameters where PEFT's LoRA would replace their names.

        PEFT takes the names of an expert's layers in transformers 4 for the fused experts of transformers 5, and drops
        the linear layers of the same names: https://github.com/huggingface/peft/blob/v0.21.2/src/peft/utils/transformers_weight_conversion.py
        """
        if isinstance(targets.modules, str):
            return targets
        lost = [name for name in targets.modules if name.rpartition(".")[2] in self.renamed]
        layers = [name for name in self.linear if any(is_target(name, target) for target in lost)]
        weights = self.short_names([f"{name}.weight" for name in layers], parts=3)
        kept = [name for name in targets.modules if name not in lost or not layers]
        return Targets(kept, (*targets.parameters, *weights))

    def sizes(self, modules: str | tuple[str, ...]) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of the linear layers that `modules` names; of all layers where it names none."""
        if modules == "all-linear":
            return [size for name, size in self.linear.items() if name not in (*self.routers, *self.not_called)]
        names = self.target_module_names(modules) if isinstance(modules, str) else modules
        sizes = [size for name, size in self.linear.items() if any(is_target(name, target) for target in names)]
        return sizes or list(self.linear.values())


def _check_halves(modules: tuple[str, ...], shape: ModelShape) -> None:
    """Raise a UserError for one of two layers of an expert that are one parameter."""
    if not any(is_target(parameter, "gate_up_proj") for parameter in shape.experts):
        return
    for first, second in (("gate_proj", "up_proj"), ("w1", "w3")):
        if (first in modules) != (second in modules):
            named, other = (first, second) if first in modules else (second, first)
            raise UserError(
                f"`{named}` and `{other}` of the experts are one parameter, `gate_up_proj`",
                where="adapter.target_modules",
                hint="Name both, or `gate_up_proj`.",
            )


def is_target(name: str, target: str) -> bool:
    """Return whether PEFT matches a module's name with an entry of `target_modules`."""
    return name == target or name.endswith(f".{target}")


def in_attention(name: str) -> bool:
    """Return whether a layer belongs to attention, by the name of a block around it."""
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def largest_divisor(sizes: list[int], limit: int) -> int:
    """Return the largest whole number up to `limit` that divides all sizes."""
    return next(number for number in range(limit, 0, -1) if all(size % number == 0 for size in sizes))
