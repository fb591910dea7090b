"""Tenants: features of one group that train side by side, each as if it were alone (docs/tenants.md)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flix.backends.torch import primitives
from flix.backends.torch.by_feature import means_by_owner, owners_of
from flix.backends.torch.heads import base_parameters
from flix.backends.torch.patches import optimizers
from flix.backends.torch.patches.models import state_of
from flix.backends.torch.tenant import (
    Tenant,
    batch_norms,
    make_tenant,
    refuse_batch_norms,
    refuse_changed,
    refuse_processes,
)
from flix.backends.torch.tenants_files import read_tenant, save_tenant
from flix.backends.verbs import Verbs
from flix.core.checks import whole
from flix.core.errors import ConfigError, FeatureError, listed, near
from flix.core.features.names import Feature, normal_name, written
from flix.core.features.owners import owner_parts
from flix.core.files import Path_

_verbs = Verbs(primitives)
Optimizers = Callable[..., torch.optim.Optimizer]
Schedules = Callable[[torch.optim.Optimizer], Any]


class Tenants:
    """The features of a group as tenants: they share batches, and each ends where it would have ended alone::

        tenants = Tenants(model, "tenant", torch.optim.AdamW, lr={"ann": 1e-3, "ben": 3e-4}, steps={"ann": 500})
        while tenants.active:
            batch = next(batches)  # rows of several tenants
            logits = model(batch.inputs, flix_features=batch.routing).logits
            tokens = F.cross_entropy(logits.mT, batch.labels, reduction="none")
            losses = tenants.losses(tokens, batch.routing, batch.labels != -100)
            sum(losses.values()).backward()
            tenants.step()

    Every tenant has its own optimizer, so any optimizer works that needs no closure. Only tenants that had rows take
    a step. The others keep their values, their optimizer's state and the position in their schedule. Whatever couples
    rows, and so tenants, is refused: rows with two tenants, batch norm in training, several processes. Random numbers
    are not those of a run alone: with dropout, a tenant's run is a different one, as good as a run alone.

    Args:
        model: an adapted model; its base and all other features are frozen.
        group: the group; its features that train are the tenants.
        optimizer: makes a tenant's optimizer of ``[parameter]`` and, if given, ``lr=``: a class of ``torch.optim``, a
            ``functools.partial`` of one, or any function; or one for each name.
        lr: learning rates, for all or by name; None leaves them to ``optimizer``.
        schedule: makes a learning-rate schedule of a tenant's optimizer, for all or by name; it advances with the
            tenant's own steps.
        steps: the number of steps after which tenants stop, for all or by name.
        max_norm: the norms to which gradients are clipped, for all or by name, each by its own norm.
        matrices: give optimizers each layer's A ``[r, d_in]`` and B ``[d_out, r]``, which are views of the parameter,
            instead of the parameter, which is a vector; for optimizers that look at shapes (Adafactor, Muon).

    Raises:
        TargetError: the model is not adapted.
        FeatureError: an unknown group or tenant.
        ConfigError: no feature of the group trains, or other features do; a setting out of its range; an optimizer or
            schedule that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        group: str,
        optimizer: Optimizers | Mapping[str, Optimizers],
        *,
        lr: float | Mapping[str, float] | None = None,
        schedule: Schedules | Mapping[str, Schedules] | None = None,
        steps: int | Mapping[str, int] | None = None,
        max_norm: float | Mapping[str, float] | None = None,
        matrices: bool = False,
    ) -> None:
        self._state = state_of("Tenants", model)
        refuse_processes()
        registry = self._state.config.registry
        self.model = model
        self.group: str = registry.features[registry.ids_of(group)[0]][0]
        self._matrices = matrices
        self._tenants: dict[str, Tenant] = {}
        self._counted: set[str] | None = None
        self._batch_norms = batch_norms(model)
        trained = {f for f, p in self._parameters().items() if p.requires_grad}
        names = [name for name in registry.names(group) if (self.group, name) in trained]
        self._refuse_others(trained)
        if not names:
            raise ConfigError(
                f"no feature of group {self.group!r} trains; thaw(model, ...) those that should be tenants"
            )
        self._settings: dict[str, Any] = {"optimizer": optimizer, "lr": lr}
        self._settings |= {"schedule": schedule, "steps": steps, "max_norm": max_norm}
        for what, given in self._settings.items():
            for name in given if isinstance(given, Mapping) else ():
                if name not in names:
                    raise FeatureError(
                        f"{what} names {name!r}{near(str(name), names)}; the tenants are {listed(names)}"
                    )
        for name in names:
            self._tenants[name] = self._made(name, {})

    def __getitem__(self, name: str) -> Tenant:
        """A tenant, by name."""
        if name not in self._tenants:
            raise FeatureError(
                f"no tenant {name!r}{near(str(name), self._tenants)}; there are {listed(self._tenants)}"
            )
        return self._tenants[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tenants)

    def __len__(self) -> int:
        return len(self._tenants)

    @property
    def active(self) -> tuple[str, ...]:
        """The names of the tenants that still train; draw rows of these."""
        return tuple(name for name, tenant in self._tenants.items() if not tenant.stopped)

    def losses(
        self, losses: Tensor, features: Any, counts: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Each tenant's own mean loss; differentiate their sum.

        Rows of stopped tenants and of frozen features run as usual, but their losses have no gradient.

        Args:
            losses: ``[batch]`` or ``[batch, length]``, before any mean.
            features: the batch's routing, as it was passed to the model.
            counts: how much each loss counts, of the shape of ``losses``; default: 1 each.

        Returns:
            A scalar by name. Tenants for which nothing counts are left out and take no step for it.

        Raises:
            RoutingError: another batch's shapes, or a row of two tenants.
            ConfigError: rows of a feature that trains but is not a tenant, or the errors of :meth:`step`.
        """
        self._check()
        owners = owners_of(features, self.group, self._state.config.registry)
        parameters = self._parameters()
        for feature in owners.features:
            parameter, name = parameters.get(feature), feature[1]
            if name not in self._tenants and parameter is not None and parameter.requires_grad:
                raise ConfigError(
                    f"{written(feature)} has rows and trains, but is no tenant: join({name!r}), or freeze it"
                )
        found = means_by_owner(losses, owners, counts)
        active = set(self.active)
        self._counted = (self._counted or set()) | (active & found.keys())
        return {name: value if name in active else value.detach() for name, value in found.items()}

    def parts(self, features: Any, rows: int) -> list[list[int]]:
        """A batch in parts, each with all rows of its tenants; step once after the last part::

            for part in tenants.parts(routing, 16):
                logits = model(input_ids[part], flix_features=routing[part]).logits
                ...  # losses and backward, as for a whole batch
            tenants.step()

        Args:
            features: the batch's routing.
            rows: the most rows of a part; a tenant with more rows has a part of its own.

        Returns:
            The places of each part's rows, in ascending order; together, they contain every row once.

        Raises:
            RoutingError, ConfigError: a row of two tenants; rows below 1.
        """
        owners = owners_of(features, self.group, self._state.config.registry)
        return [part.tolist() for part in owner_parts(owners, rows)]

    def step(self) -> tuple[str, ...]:
        """Let every tenant that has a gradient take one step, and clear all gradients.

        Tenants for which nothing counted in the calls of :meth:`losses` since the last step take none.

        Returns:
            The names of the tenants that took a step.

        Raises:
            ConfigError: a tenant's parameter was frozen or replaced from outside, or batch norm is in training mode.
        """
        self._check()
        optimizers.take_away(self._state)
        acting = {
            name: tenant
            for name, tenant in self._tenants.items()
            if not tenant.stopped
            and tenant.parameter.grad is not None
            and (self._counted is None or name in self._counted)
        }
        for tenant in acting.values():
            tenant.step()
        self.zero_grad()
        for name, tenant in acting.items():
            if tenant.limit is not None and tenant.taken >= tenant.limit:
                self.stop(name)
        return tuple(acting)

    def zero_grad(self) -> None:
        """Clear the gradients and the notes of :meth:`losses`: forget the batches since the last step."""
        for tenant in self._tenants.values():
            tenant.parameter.grad = None
        optimizers.begin_anew(self._state)
        self._counted = None

    def stop(self, name: str) -> None:
        """Stop training a tenant. Its values keep their bits, and its rows are still answered."""
        tenant = self[name]
        tenant.stopped, tenant.parameter.grad = True, None
        tenant.parameter.requires_grad_(False)

    def go_on(self, name: str, steps: int | None = None) -> None:
        """Let a stopped tenant train again, from where it was.

        Args:
            name: the tenant.
            steps: the total number of steps after which it stops; None: never.

        Raises:
            FeatureError: no such tenant.
            ConfigError: steps that it has taken already.
        """
        tenant = self[name]
        if steps is not None and whole(steps, f"steps of {name!r}", 1) <= tenant.taken:
            raise ConfigError(
                f"{name!r} has taken {tenant.taken} steps; steps must be more, got {steps}"
            )
        tenant.limit, tenant.stopped = steps, False
        tenant.parameter.requires_grad_(True)

    def join(
        self,
        name: str,
        rank: int | None = None,
        *,
        init_from: str | Sequence[str] | None = None,
        **settings: Any,
    ) -> Tenant:
        """Let a tenant join in the middle of a run; the others do not change.

        Args:
            name: a feature of the group that the model has, or a new one.
            rank: the rank of a new feature.
            init_from: what a new feature starts from, as for ``add_feature``.
            settings: its own ``optimizer``, ``lr``, ``schedule``, ``steps`` and ``max_norm``; default: the values for
                all.

        Returns:
            The tenant.

        Raises:
            FeatureError: it is a tenant already.
            RankError: no rank for a new feature.
            ConfigError: as for the class.
        """
        self._check()
        if name in self._tenants:
            raise FeatureError(f"{name!r} is a tenant already; go_on or resume it")
        self._refuse_unknown(settings)
        if self._state.config.registry.find(self.group, name) is None:
            _verbs.add_feature(
                self.model, self.group, name, rank, init_from=init_from, freeze_others=False
            )
        elif rank is not None or init_from is not None:
            raise ConfigError(
                f"{name!r} is a feature of the model; rank and init_from are for new ones"
            )
        tenant = self._tenants[name] = self._made(name, settings)
        return tenant

    def leave(self, name: str, *, remove: bool = True) -> None:
        """Let a tenant leave. Its optimizer is dropped, and its feature is removed unless you say otherwise.

        Raises:
            FeatureError: no such tenant, or the last feature of the group.
        """
        self[name]
        if remove:
            _verbs.remove_feature(self.model, self.group, name)
        else:
            self.stop(name)
        del self._tenants[name]

    def rename(self, name: str, new: str) -> None:
        """Give a tenant, and its feature, another name.

        Raises:
            FeatureError: no such tenant, or a new name that is ill-formed or taken.
        """
        tenant = self[name]
        _verbs.rename_feature(self.model, self.group, name, new)
        new = normal_name(self.group, new)
        tenant.feature = (self.group, new)
        self._tenants = {new if key == name else key: t for key, t in self._tenants.items()}

    def save(self, name: str, folder: Path_) -> None:
        """Write one tenant: its adapter, for ``load`` and ``load_features``, and the state of its training.

        The state is one file, ``flix_tenant.pt``, which also holds the values, bit for bit. Even if the process is
        killed, the file is of a single step. It is read without running code (``torch.load(weights_only=True)``).

        Raises:
            FeatureError: no such tenant.
            ConfigError: an optimizer or schedule whose state holds what such a file cannot.
            AdapterError: the path is a file.
        """
        tenant = self[name]
        save_tenant(folder, tenant, self._state)
        _verbs.save(self.model, folder, [tenant.feature])

    def resume(self, name: str, folder: Path_, **settings: Any) -> Tenant:
        """Let a saved tenant continue from where it was: values, optimizer, schedule and steps.

        Args:
            name: the tenant; the model need not have it yet. If it is a tenant already, it goes back.
            folder: the folder that :meth:`save` wrote.
            settings: as for :meth:`join`. The number of steps taken is the saved one. So is the limit, unless you
                pass ``steps``.

        Returns:
            The tenant.

        Raises:
            AdapterError: no tenant's folder, a damaged one, another tenant's, or one of another model: the first layer
                that differs is named.
            ConfigError: the optimizer or schedule is not the one that was saved.
        """
        self._check()
        self._refuse_unknown(settings)
        said = read_tenant(folder, (self.group, name))
        new = self._state.config.registry.find(self.group, name) is None
        if new:
            _verbs.load_features(self.model, folder, [(self.group, name)])
        try:
            said.check(self._state)
            tenant = self._made(name, settings)
            said.put(tenant)
        except BaseException:
            if new:
                _verbs.remove_feature(self.model, self.group, name)
            raise
        if "steps" not in settings:
            tenant.limit = said.limit
        self._tenants[name] = tenant
        over = tenant.limit is not None and tenant.taken >= tenant.limit
        if over or (said.stopped and "steps" not in settings):
            self.stop(name)
        return tenant

    def _made(self, name: str, given: Mapping[str, Any]) -> Tenant:
        settings = {what: self._setting(what, name, given) for what in self._settings}
        for what in ("optimizer", "lr"):
            if settings[what] is None and self._settings[what] is not None:
                raise ConfigError(
                    f"{what} must name every tenant, but {name!r} is missing: give {what}="
                )
        return make_tenant(self._state.bank, (self.group, name), settings, self._matrices)

    def _setting(self, what: str, name: str, settings: Mapping[str, Any]) -> Any:
        given = settings.get(what, self._settings[what])
        return given.get(name) if isinstance(given, Mapping) else given

    def _parameters(self) -> dict[Feature, nn.Parameter]:
        bank = self._state.bank
        return {bank.features[i]: parameter for i, parameter in bank.held().items()}

    def _check(self) -> None:
        """Refuse what would make tenants wrong without a word."""
        for name, tenant in self._tenants.items():
            refuse_changed(name, tenant, self._state.bank)
        refuse_batch_norms(self._batch_norms)

    def _refuse_others(self, trained: set[Feature]) -> None:
        others = [written(f) for f in sorted(trained) if f[0] != self.group]
        others += [n for n, p in base_parameters(self.model) if p.requires_grad]
        if others:
            raise ConfigError(
                f"{listed(others, 5)} would also train, on the rows of several tenants, and none "
                "would end where it ends alone; freeze what is not a tenant's"
            )

    def _refuse_unknown(self, settings: Mapping[str, Any]) -> None:
        for what in settings:
            if what not in self._settings:
                raise TypeError(f"no setting {what!r}; there are {', '.join(self._settings)}")
