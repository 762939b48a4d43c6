"""The plugin contract, each hook and each way to break it, with small fake plugins."""

from dataclasses import dataclass
from pathlib import Path

import pluggy
import pytest

from core.errors import ConfigError, PlanError, PluginError
from core.plugin import hookspecs
from core.plugin.families import FAMILIES
from core.plugin.hookspecs import PROJECT, Registration, hookimpl
from core.plugin.plugin_manager import PluginManager
from core.plugin.sources import BUILTIN_PLUGINS
from core.settings.config import (
    AppConfig,
    AttentionConfig,
    FrontendConfig,
    LaunchConfig,
    MetricsConfig,
    ModelConfig,
    ParallelConfig,
    PluginChoice,
)


@dataclass(slots=True, kw_only=True)
class SplitOptions:
    num_splits: int = 1
    label: str = "none"


class Attention:
    """Registers one attention backend whose factory hands back what it was given."""

    def __init__(self, name="split", override=False, factory=lambda *arguments: arguments):
        self.registration = Registration(
            name=name, factory=factory, config=SplitOptions, override=override
        )

    @hookimpl
    def register_attention(self):
        return [self.registration]


def load(blocklist=(), **objects):
    return PluginManager.load(blocklist, builtins=(), objects=objects)


def config_with(**sections) -> AppConfig:
    return AppConfig(model=ModelConfig(name="m", path="/m"), **sections)


def test_a_choice_is_built_with_typed_options():
    choice = PluginChoice(name="split", options={"num_splits": 4})
    table = load(acme=Attention()).table("attention")
    assert table.create(choice, "spec") == (SplitOptions(num_splits=4), "spec")
    assert list(table) == ["split"]
    assert len(table) == 1
    assert "split" in table
    assert "other" not in table
    assert table.get("split").config is SplitOptions
    assert table.plugin_of("split") == "acme"


def test_every_registering_hook_fills_its_table():
    for family, where in FAMILIES.items():
        registration = Registration(name="acme", factory=lambda *arguments: arguments)
        hook = hookimpl(lambda registration=registration: [registration])
        plugin = type("Plugin", (), {where.hook: staticmethod(hook)})()
        manager = load(acme=plugin)
        assert list(manager.table(family)) == ["acme"], family
        assert all(not manager.table(other) for other in FAMILIES if other != family)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"num_split": 4}, ["attention.decode.options.num_split", "'num_splits'", "label"]),
        ({"num_splits": "4"}, ["attention.decode.options.num_splits='4'", "an integer"]),
    ],
)
def test_wrong_options_are_refused_with_the_full_key(options, fragments):
    manager = load(acme=Attention())
    choice = PluginChoice(name="split", options=options)
    config = config_with(attention=AttentionConfig(decode=choice))
    for attempt in (
        lambda: manager.options("attention", choice, "attention.decode"),
        lambda: manager.table("attention").create(choice, key="attention.decode"),
        lambda: manager.check_choices(config),
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        for fragment in fragments:
            assert fragment in str(caught.value)


def test_options_of_auto_are_refused():
    config = config_with(attention=AttentionConfig(prefill=PluginChoice(options={"label": "x"})))
    with pytest.raises(ConfigError, match=r"attention\.prefill\.options .* choose it: split"):
        load(acme=Attention()).check_choices(config)


def test_an_unknown_name_is_answered_with_those_there_are():
    manager = load(a=Attention("split"), b=Attention("paged"))
    with pytest.raises(PluginError) as caught:
        manager.table("attention").get("splitt")
    assert "attention plugin 'splitt'; did you mean 'split'?" in str(caught.value)
    assert "paged, split" in str(caught.value)


def test_a_duplicate_name_is_refused_naming_both_plugins():
    with pytest.raises(PluginError, match="'split' is registered twice: by 'a' and by 'b'"):
        load(a=Attention(), b=Attention())


def test_an_override_replaces_whatever_the_order():
    for objects in (
        {"old": Attention(), "new": Attention(override=True)},
        {"new": Attention(override=True), "old": Attention()},
    ):
        assert load(**objects).table("attention").plugin_of("split") == "new"


def test_two_overrides_and_a_hidden_duplicate_are_refused():
    with pytest.raises(PluginError, match="'split' is overridden twice: by 'b' and by 'c'"):
        load(a=Attention(), b=Attention(override=True), c=Attention(override=True))
    with pytest.raises(PluginError, match="'split' is registered twice: by 'a' and by 'c'"):
        load(a=Attention(), b=Attention(override=True), c=Attention())


def test_a_factory_is_imported_when_chosen():
    table = load(acme=Attention(factory="collections:Counter")).table("attention")
    with pytest.raises(TypeError):  # Counter, called with a dataclass: it was imported
        table.create(PluginChoice(name="split"))


@pytest.mark.parametrize("factory", ["no_such_module_at_all:make", "collections:NoSuchThing"])
def test_a_factory_that_fails_to_import_is_named_with_its_cause(factory):
    table = load(acme=Attention(factory=factory)).table("attention")
    with pytest.raises(PluginError) as caught:
        table.create(PluginChoice(name="split"))
    for fragment in ("'split' (from acme)", factory, factory.partition(":")[2][:2]):
        assert fragment in str(caught.value)
    assert caught.value.__cause__ is not None


def test_a_misspelled_hook_is_named():
    class Misspelled:
        @hookimpl
        def register_atention(self):
            return []

    with pytest.raises(PluginError) as caught:
        load(acme=Misspelled())
    assert "'acme'" in str(caught.value)
    assert "'register_atention'; did you mean 'register_attention'?" in str(caught.value)
    assert "config_searchpath" in str(caught.value)


def test_wrong_arguments_of_a_hook_are_named():
    class Wrong:
        @hookimpl
        def check_plan(self, configuration):
            return []

    with pytest.raises(PluginError, match=r"(?s)'acme'.*breaks the plugin contract.*configuration"):
        load(acme=Wrong())


def test_a_plugin_without_hooks_is_refused():
    with pytest.raises(PluginError, match=r"'acme'.*implements no hook.*hookimpl"):
        load(acme=object())


@pytest.mark.parametrize("error", [OSError("no such device"), SystemExit("no such device")])
def test_a_failing_hook_is_named_with_its_cause(error):
    class Failing:
        @hookimpl
        def register_comm(self):
            raise error

    with pytest.raises(
        PluginError,
        match=f"'acme' failed in register_comm: {type(error).__name__}: no such device",
    ):
        load(acme=Failing())


def test_check_plan_collects_every_problem():
    class One:
        @hookimpl
        def check_plan(self, config):
            return [f"parallel.tp={config.parallel.tp} is odd", "second"]

    class Two:
        @hookimpl
        def check_plan(self, config):
            return ["third"]

    found = load(one=One(), two=Two(), three=Attention()).check_plan(config_with())
    assert found == ["parallel.tp=1 is odd", "second", "third"]


class Plans:
    """Registers one plan, whose factory raises what it is given."""

    def __init__(self, *problems):
        self.problems = problems

    def make(self, options, parallel):
        if self.problems:
            raise PlanError(self.problems)

    @hookimpl
    def register_parallel_plan(self):
        return [Registration(name="tp", factory=self.make)]

    @hookimpl
    def check_plan(self, config):
        return ["from the hook"]


def test_plan_problems_are_those_of_the_plan_and_of_the_hooks():
    assert load(p=Plans("a", "b")).plan_problems(config_with()) == ["a", "b", "from the hook"]
    assert load(p=Plans()).plan_problems(config_with()) == ["from the hook"]
    with pytest.raises(PluginError, match="no parallel_plan plugin 'tp'"):
        load(a=Attention()).plan_problems(config_with())


@dataclass(slots=True, kw_only=True)
class LatentOptions:
    block: int = 64


class Latent:
    """Registers backends of latent attention."""

    def __init__(self, *names):
        self.names = names

    @hookimpl
    def register_latent_attention(self):
        return [
            Registration(name=name, factory=lambda: None, config=LatentOptions)
            for name in self.names
        ]


def check_attention(manager, **choice):
    """check_choices of an attention choice alone: everything else is there."""
    everything = {
        family: type("All", (), {where.hook: staticmethod(hookimpl(lambda: [ANY]))})()
        for family, where in FAMILIES.items()
        if family not in ("attention", "latent_attention")
    }
    manager = load(**everything, **manager)
    config = config_with(
        attention=AttentionConfig(decode=PluginChoice(**choice)),
        parallel=ParallelConfig(plan="any", dp_balancer="any"),
        frontend=FrontendConfig(name="any"),
        metrics=MetricsConfig(exporters=["any"]),
        launch=LaunchConfig(name="any"),
    )
    manager.check_choices(config)


ANY = Registration(name="any", factory=lambda: None)


def test_an_attention_choice_is_of_either_kind_of_attention():
    plugins = {"a": Attention("split"), "b": Latent("split", "mla")}
    check_attention(plugins, name="mla", options={"block": 8})
    check_attention(plugins, name="split", options={"num_splits": 2})
    check_attention(plugins, name="split", options={"block": 8})
    with pytest.raises(ConfigError, match=r"unknown key 'attention\.decode\.options\.num_splits'"):
        check_attention(plugins, name="mla", options={"num_splits": 2})
    with pytest.raises(ConfigError, match=r"attention\.decode\.options\.x"):
        check_attention(plugins, name="split", options={"x": 2})
    with pytest.raises(PluginError, match=r"'mlb'; did you mean 'mla'\?\n.*: mla, split"):
        check_attention(plugins, name="mlb")
    with pytest.raises(ConfigError, match=r"choose it: mla, split"):
        check_attention(plugins, options={"x": 2})


class Default:
    """Knows the best backend of one device."""

    def __init__(self, device, name):
        self.device, self.name = device, name

    @hookimpl
    def default_backend(self, family, device):
        return self.name if (family, device) == ("attention.decode", self.device) else None


def test_default_backend_is_the_first_answer_the_latest_plugin_first():
    manager = load(
        a=Attention("split"),
        b=Attention("paged"),
        c=Default("cpu", "split"),
        d=Default("cpu", "paged"),
    )
    assert manager.default_backend("attention.decode", "cpu", config_with()) == "paged"
    with pytest.raises(
        ConfigError, match=r"attention\.decode backend for device 'cuda'.*paged, split"
    ):
        manager.default_backend("attention.decode", "cuda", config_with())


def test_a_default_that_does_not_exist_is_refused():
    with pytest.raises(PluginError, match="no attention plugin 'gone'"):
        load(a=Attention(), b=Default("cpu", "gone")).default_backend(
            "attention.decode", "cpu", config_with()
        )


def test_config_searchpaths_are_collected_in_order_and_checked():
    class Configs:
        def __init__(self, *paths):
            self.paths = paths

        @hookimpl
        def config_searchpath(self):
            return self.paths

    manager = load(a=Configs("pkg://a.conf"), b=Configs("file:///b", "pkg://b"))
    assert manager.config_searchpath() == ["pkg://a.conf", "file:///b", "pkg://b"]
    with pytest.raises(PluginError, match=r"'a' returned 'a\.conf'.*pkg://"):
        load(a=Configs("a.conf")).config_searchpath()


def test_the_blocklist_keeps_a_plugin_out():
    manager = load(["b"], a=Attention("split"), b=Attention("split"))
    assert manager.table("attention").plugin_of("split") == "a"
    assert manager.fingerprint() == {"a": "0"}


def test_a_blocklisted_name_that_does_not_exist_is_refused():
    with pytest.raises(PluginError, match="'acm', which is not there; did you mean 'acme'"):
        load(["acm"], acme=Attention())


def test_the_built_in_plugins_load_and_carry_our_version():
    manager = PluginManager.load()
    assert set(BUILTIN_PLUGINS) <= set(manager.fingerprint())
    for family in FAMILIES:
        assert len(manager.table(family)) > 0, family
    assert {"torch_ref", "cpu", "triton"} <= set(manager.table("attention"))
    assert {"gloo", "nccl"} <= set(manager.table("comm"))
    names = {"local", "allgather", "symm_mem", "nccl", "deepep", "emulated"}
    assert names == set(manager.table("moe_a2a"))
    assert {"tp", "tp_ep", "dp_attention"} == set(manager.table("parallel_plan"))
    assert {"static", "local", "slurm", "kubernetes", "ray"} == set(manager.table("launcher"))


AUTO_FAMILIES = [
    "comm",
    *(
        f"{family}.{phase}"
        for family in ("attention", "latent_attention", "moe_a2a")
        for phase in ("prefill", "decode")
    ),
]


@pytest.mark.parametrize("family", AUTO_FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_means_something_on_every_device(family, device):
    manager = PluginManager.load()
    name = manager.default_backend(family, device, config_with())
    assert name in manager.table(family.partition(".")[0])


def test_every_hook_is_documented():
    docs = Path(__file__).parents[3] / "docs"
    page = (docs / "plugins.md").read_text()
    manager = pluggy.PluginManager(PROJECT)
    hooks = [name for name in vars(hookspecs) if manager.parse_hookspec_opts(hookspecs, name)]
    assert len(hooks) == 20
    for hook in hooks:
        assert f"| `{hook}` |" in page
        name = f"plugins/{hook.removeprefix('register_')}.md"
        if hook.startswith("register_") or (docs / name).exists():
            assert f"]({name})" in page, "what registers something has a page of its own"
        else:
            assert f"\n### {hook}" in page


def test_every_example_is_named_on_the_page_that_it_is_of():
    root = Path(__file__).parents[3]
    pages = [path.read_text() for path in (root / "docs/plugins").glob("*.md")]
    index = (root / "docs/plugins.md").read_text()
    examples = [path.name for path in (root / "examples").glob("acme_*")]
    assert len(examples) > 10
    for name in examples:
        assert f"`examples/{name}/`" in index
        assert any(f"examples/{name}/" in page for page in pages), name
