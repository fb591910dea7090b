"""Base and adapter in one call: the adapter's files say what they stand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flix import hub
from flix.core.adapter.adapter import Adapter
from flix.core.adapter.base import differing
from flix.core.adapter.files import stored_adapter
from flix.core.errors import AdapterError, ConfigError, listed, shown
from flix.core.files import Path_
from flix.tasks.bases import begun, load_base, load_class, load_tokenizer, locate
from flix.tasks.errors import ModelError
from flix.tasks.making import make_task
from flix.tasks.recipe import RECIPE, read_recipe
from flix.tasks.task import Task

_MAKE = ("kind", "name", "columns", "prompt", "labels", "max_source", "max_target")


def load_pretrained(
    adapter: Path_,
    *,
    base: Path_ | None = None,
    model_class: Any = None,
    revision: str | None = None,
    dtype: str = "float32",
    strategy: str = "auto",
    **settings: Any,
) -> Any:
    """The model that an adapter was trained on, with the adapter, ready to answer.

    The base is the one that the adapter's files name, at the commit that they name. If ``flix train`` left a
    ``recipe.json`` next to them, the model has the class that its tasks need, with their heads. Otherwise it has the
    class that the base's own configuration names, or ``model_class``.

    Args:
        adapter: the adapter's folder, or its name on a hub, ``org/name``.
        base: where the base is now, a folder or a name on a hub; default: where the files say.
        model_class: a class with ``from_pretrained``, such as ``AutoModelForSequenceClassification``.
        revision: a branch, tag or commit of the adapter on its hub.
        dtype: the dtype of the base's parameters; ``"auto"`` keeps that of its file.
        strategy: as for ``adapt``.
        settings: arguments for ``model_class.from_pretrained``, such as ``num_labels``.

    Returns:
        The adapted model, in evaluation mode.

    Raises:
        AdapterError: no adapter, or a damaged one; files that name no base; a base of another architecture, or with
            other values in its kernels; parameters that are neither in the base's files nor in the adapter's.
        ModelError: the base is not there, or cannot be loaded.
    """
    from flix.backends.torch import verbs

    folder = Path(hub.place(adapter, revision))
    with stored_adapter(folder) as stored:
        place = _place(stored, folder, base)
        if place.recipe is not None and model_class is None:
            tasks = tasks_of(folder, tokenizer_of(folder, base=base))
            plain = load_base(place.name, tasks, dtype, revision=place.commit)
            fresh = begun(plain)
        else:
            more = {**settings, "revision": place.commit} if place.commit else settings
            plain, fresh = load_class(place.name, model_class, dtype, **more)
        said = None
        try:
            verbs.check_fits(stored, plain)
            said = differing(stored.base, verbs.base_of(plain, stored.layers))
            if said is None:
                _check_whole(fresh, stored)
                return verbs.load_into(plain, stored, strategy=strategy).eval()
        except AdapterError as error:
            if place.recipe is not None or model_class is not None:
                raise
            raise AdapterError(
                f"{error}. The base was loaded as the class that its configuration names, {type(plain).__name__}; "
                "model_class= names another one"
            ) from error
        raise AdapterError(f"{said}; base= names another place to look for it")


def tokenizer_of(adapter: Path_, *, base: Path_ | None = None, revision: str | None = None) -> Any:
    """The tokenizer of an adapter: the one in its folder, the one that its recipe names, or the base's.

    Args:
        adapter: as for :func:`load_pretrained`.
        base: where the base is now.
        revision: of the adapter on its hub.

    Raises:
        AdapterError: no adapter, or files that name no base.
        ModelError: there is no tokenizer.
    """
    folder = Path(hub.place(adapter, revision))
    if (folder / "tokenizer_config.json").is_file():
        return load_tokenizer(str(folder))
    with stored_adapter(folder) as stored:
        place = _place(stored, folder, base)
    named = (place.recipe or {}).get("tokenizer")
    if named is None:
        return load_tokenizer(place.name)
    try:
        return load_tokenizer(locate(named))
    except ModelError as error:
        raise ModelError(
            f"the tokenizer that {shown(str(folder / RECIPE))} names is not there: {error}; save it into the adapter's folder, "
            "or write where it is now into the file"
        ) from error


def base_place(adapter: Path_, base: Path_ | None = None) -> tuple[str, str | None]:
    """Where the base of an adapter is, a folder or a name on a hub, and the commit of it that the adapter stands on.

    Args:
        adapter: the adapter's folder.
        base: where the base is now; default: where the adapter's files say.

    Raises:
        AdapterError: no adapter, or files that name no base.
        ModelError: the base is not there.
    """
    folder = Path(hub.place(adapter))
    with stored_adapter(folder) as stored:
        place = _place(stored, folder, base)
    return place.name, place.commit


def tasks_of(adapter: Path_, tokenizer: Any, *, revision: str | None = None) -> list[Task]:
    """The tasks that an adapter was trained on, as its recipe describes them.

    Args:
        adapter: as for :func:`load_pretrained`.
        tokenizer: as :func:`tokenizer_of` gives it.
        revision: of the adapter on its hub.

    Raises:
        AdapterError: no recipe next to its files, or a damaged one.
    """
    folder = Path(hub.place(adapter, revision))
    if (recipe := read_recipe(folder)) is None:
        raise AdapterError(
            f"{str(folder)!r} holds no recipe.json, which flix train writes beside an adapter; make_task makes tasks by hand"
        )
    made = []
    for said in recipe["tasks"]:
        known = {key: said[key] for key in _MAKE if said.get(key) is not None}
        try:
            made.append(make_task(known.pop("kind"), tokenizer, **known))
        except ConfigError as error:
            raise AdapterError(f"{folder / RECIPE}: not a recipe of an adapter: {error}") from None
    return made


def _check_whole(fresh: Sequence[str], stored: Adapter) -> None:
    """Refuse a model of which a part began at random: it would answer otherwise at every load."""
    random = [name for name in fresh if name not in stored.heads]
    if random:
        raise AdapterError(
            f"neither the base's files nor the adapter's hold {listed(random, 5)}, which would "
            f"start at random at every load; "
            "save the base that the adapter was trained on (base.save_pretrained), or train the adapter with these "
            "parameters unfrozen"
        )


@dataclass(frozen=True)
class _Place:
    """Where an adapter's base is."""

    name: str
    commit: str | None
    recipe: Mapping[str, Any] | None


def _place(stored: Adapter, folder: Path, base: Path_ | None) -> _Place:
    recipe = read_recipe(folder)
    if base is not None:
        return _Place(locate(str(base)), None, recipe)
    known = stored.base
    name = known.name if known is not None else None
    commit = known.revision if known is not None else None
    if recipe is not None and recipe["model"] != name:
        name, commit = recipe["model"], commit if name is None else None
    if not name:
        raise AdapterError(
            f"{shown(str(folder))} does not name the base that it was trained on; say where it is: load_pretrained(adapter, "
            "base=...)"
        )
    try:
        place = locate(name)
    except ModelError as error:
        raise ModelError(
            f"the base of {shown(str(folder))} is not where it was: {error}; base= says where it is now"
        ) from error
    return _Place(place, commit if place == name and not Path(place).is_dir() else None, recipe)
