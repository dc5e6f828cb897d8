import glob
import mmap
import pickle
import sys
from collections.abc import Iterable
from pathlib import Path
from zipfile import ZipFile

import pytest

from actors.driver.arguments import Gpu, LaunchSettings
from actors.driver.binaries import find_binaries
from actors.driver.engines import default_settings
from recovery.adjustments import (
    ADJUSTMENTS,
    BROWSER_ORDER,
    WITHOUT_EQUIVALENT,
    Adjustment,
    LaunchAdjustment,
    adjust,
    fallback_order,
    merge_arguments,
)
from recovery.errors import BrowserMissing
from recovery.failures import Category
from recovery.kinds import BrowserType, ModelType

CHROME, FIREFOX, SAFARI, EDGE = (
    BrowserType.CHROME,
    BrowserType.FIREFOX,
    BrowserType.SAFARI,
    BrowserType.EDGE,
)
WEBNN = "WebMachineLearningNeuralNetwork"
DOCUMENT = Path(__file__).parents[2] / "docs" / "adjustments.md"
# Those that start at AGGRESSIVE, or come to it when a plain restart has not helped.
ADJUSTED = (
    Category.RESOURCE_EXHAUSTION,
    Category.GPU_ERROR,
    Category.API_ERROR,
    Category.CRASH,
    Category.LAUNCH_FAILURE,
)


def launches(kind: BrowserType) -> list[LaunchSettings]:
    """Every launch of this kind that tabpool starts with by itself."""
    return [
        default_settings(kind, headless=headless, gpu=gpu, root=root, small_shm=small_shm)
        for headless in (True, False)
        for gpu in Gpu
        for root in (True, False)
        for small_shm in (True, False)
    ]


def changes(settings: LaunchSettings, adjustment: LaunchAdjustment | Adjustment) -> bool:
    arguments = merge_arguments(settings.arguments, adjustment.arguments)
    return (
        arguments != settings.arguments
        or {**settings.preferences, **adjustment.preferences} != settings.preferences
        or {**settings.environment, **adjustment.environment} != settings.environment
    )


# --- the table ---


@pytest.mark.parametrize("kind", [CHROME, FIREFOX, EDGE])
@pytest.mark.parametrize("category", ADJUSTED)
@pytest.mark.parametrize("model_type", ModelType)
def test_adjusted_restart_differs_from_every_ordinary_launch(kind, category, model_type):
    adjustment = adjust(kind, model_type, category)
    assert all(changes(settings, adjustment) for settings in launches(kind))


@pytest.mark.parametrize("row", ADJUSTMENTS, ids=lambda row: row.why[:40])
def test_every_row_changes_an_ordinary_launch_by_itself_and_says_why(row):
    assert any(changes(settings, row) for settings in launches(row.browser))
    assert row.why
    assert row.category in (None, *ADJUSTED)


def test_rows_stand_by_browser_and_a_failure_has_the_last_word_over_a_model_type():
    browsers = [row.browser for row in ADJUSTMENTS]
    assert browsers == sorted(browsers, key=[CHROME, FIREFOX, SAFARI, EDGE].index)
    for browser in BrowserType:
        by_failure = [bool(row.category) for row in ADJUSTMENTS if row.browser is browser]
        assert by_failure == sorted(by_failure)


def test_only_firefox_has_preferences_and_only_chromium_has_arguments():
    for row in ADJUSTMENTS:
        assert not row.preferences or row.browser is FIREFOX
        assert not row.arguments or row.browser in (CHROME, EDGE)


def test_no_row_weakens_the_sandbox_or_switches_on_a_gpu_that_is_off():
    forbidden = ("sandbox", "unsafe-webgpu", "dom.webgpu.enabled", "site-isolation", "web-security")
    for row in ADJUSTMENTS:
        for name in (*row.arguments, *row.preferences, *row.environment):
            assert not any(word in name for word in forbidden), name


def test_edge_is_adjusted_as_chrome_is():
    for model_type in ModelType:
        for category in Category:
            assert adjust(EDGE, model_type, category) == adjust(CHROME, model_type, category)


def test_adjustment_merges_its_rows_in_order():
    adjustment = adjust(CHROME, ModelType.TEXT, Category.API_ERROR)
    assert adjustment.arguments == (
        f"--enable-features={WEBNN},Experimental{WEBNN}",
        "--gpu-disk-cache-size-kb=65536",
        "--ignore-gpu-blocklist",
    )
    assert len(adjustment.reasons) == 4
    assert pickle.loads(pickle.dumps(adjustment)) == adjustment


def test_firefox_is_adjusted_by_preferences_and_environment():
    adjustment = adjust(FIREFOX, ModelType.VISION, Category.GPU_ERROR)
    assert adjustment.preferences["gfx.webrender.software"] is True
    assert adjustment.environment == {"VK_LOADER_DRIVERS_SELECT": "lvp_*"}
    assert adjustment.arguments == ()


def test_nothing_to_change_is_false():
    assert not adjust(SAFARI, ModelType.AUDIO, Category.API_ERROR)
    assert not adjust(CHROME, ModelType.UNKNOWN, Category.TIMEOUT)
    assert adjust(SAFARI, ModelType.AUDIO, Category.CRASH)


def test_the_documents_wishes_are_met_or_listed():
    """The tables "Chrome, Firefox and Edge Optimizations" of the documents, wish by wish."""
    for kind, model_type, category, name in (
        (CHROME, ModelType.UNKNOWN, Category.RESOURCE_EXHAUSTION, "--disable-gpu-rasterization"),
        (CHROME, ModelType.UNKNOWN, Category.RESOURCE_EXHAUSTION, "--disable-gpu-vsync"),
        (CHROME, ModelType.UNKNOWN, Category.GPU_ERROR, "--disable-gpu-process-crash-limit"),
        (CHROME, ModelType.UNKNOWN, Category.GPU_ERROR, "--disable-gpu-watchdog"),
        (CHROME, ModelType.UNKNOWN, Category.CRASH, "--disable-breakpad"),
        (EDGE, ModelType.TEXT, Category.CRASH, f"--enable-features={WEBNN}"),
    ):
        assert name in adjust(kind, model_type, category).arguments
    exhausted = adjust(FIREFOX, ModelType.UNKNOWN, Category.RESOURCE_EXHAUSTION).preferences
    assert exhausted["browser.cache.memory.capacity"] == 32 * 1024
    assert exhausted["browser.sessionhistory.max_entries"] == 2
    replaced = {(row.browser, row.instead_of.partition(" (")[0]) for row in ADJUSTMENTS}
    assert replaced >= {
        (CHROME, "low-end device mode"),
        (CHROME, "disable crash reporter"),
        (CHROME, "shader precompilation"),
        (FIREFOX, "unsafe WebGPU operations"),
        (FIREFOX, "disable WebRender"),
        (FIREFOX, "disable multiprocess tabs"),
        (EDGE, "the WebNN extension in Dawn"),
    }
    listed = {(row.browser, row.wish) for row in WITHOUT_EQUIVALENT}
    assert len(listed) == len(WITHOUT_EQUIVALENT)
    assert listed >= {
        (FIREFOX, "Compute shader workgroup size 256x1x1 (audio)"),
        (FIREFOX, "Single process mode"),
        (EDGE, "WebNN compile options"),
        (CHROME, "Zero copy of images"),
    }


# --- merging arguments ---


def test_feature_lists_become_one():
    base = ("--a", "--enable-features=Vulkan,WebNN", "--b")
    extra = ("--enable-features=WebNN,More", "--disable-features=Spare")
    assert merge_arguments(base, extra) == (
        "--a",
        "--enable-features=Vulkan,WebNN,More",
        "--b",
        "--disable-features=Spare",
    )


def test_every_ordinary_launch_keeps_its_features_when_it_is_adjusted():
    for settings in launches(CHROME):
        for model_type in ModelType:
            for category in Category:
                extra = adjust(CHROME, model_type, category).arguments
                merged = merge_arguments(settings.arguments, extra)
                names = [argument.partition("=")[0] for argument in merged]
                assert len(names) == len(set(names))
                if settings.gpu is Gpu.SOFTWARE:
                    features = next(a for a in merged if a.startswith("--enable-features="))
                    assert f"Vulkan,{WEBNN}" in features


def test_later_word_on_a_feature_wins():
    assert merge_arguments(("--enable-features=A,B:x/1",), ("--disable-features=B",)) == (
        "--enable-features=A",
        "--disable-features=B",
    )
    assert merge_arguments(("--disable-features=A",), ("--enable-features=A<Trial",)) == (
        "--enable-features=A<Trial",
    )
    assert merge_arguments((), ("--enable-features=A:x/1", "--enable-features=A:x/2")) == (
        "--enable-features=A:x/2",
    )


def test_v8_flags_become_one_argument_in_which_the_later_word_wins():
    base = ("--js-flags=--expose-gc --max_old_space_size=64",)
    extra = ("--js-flags=--max-old-space-size=128 --no-expose-gc --jitless",)
    assert merge_arguments(base, extra) == (
        "--js-flags=--no-expose-gc --max-old-space-size=128 --jitless",
    )


def test_later_value_of_a_switch_wins_and_nothing_stands_twice():
    base = ("-headless", "--size=1", "--mute", "url")
    assert merge_arguments(base, ("--mute", "--size=2", "-headless", "--new")) == (
        "-headless",
        "--size=2",
        "--mute",
        "url",
        "--new",
    )


def test_merging_nothing_or_the_same_again_changes_nothing():
    for settings in launches(CHROME):
        assert merge_arguments(settings.arguments, ()) == settings.arguments
        assert merge_arguments(settings.arguments, settings.arguments) == settings.arguments
    assert merge_arguments(("--enable-features=",), ()) == ()


# --- model types ---


@pytest.mark.parametrize(
    ("model_type", "order"),
    [
        (ModelType.TEXT, (EDGE, CHROME, FIREFOX, SAFARI)),
        (ModelType.VISION, (CHROME, EDGE, FIREFOX, SAFARI)),
        (ModelType.AUDIO, (FIREFOX, CHROME, EDGE, SAFARI)),
        (ModelType.MULTIMODAL, (CHROME, EDGE, FIREFOX, SAFARI)),
        (ModelType.UNKNOWN, (EDGE, CHROME, FIREFOX, SAFARI)),
    ],
)
def test_browser_order_is_the_documents(model_type, order):
    assert BROWSER_ORDER[model_type] == order


def test_fallback_goes_to_the_best_other_kind_that_is_there():
    audio = ModelType.AUDIO
    assert fallback_order(audio, FIREFOX, set(BrowserType)) == (CHROME, EDGE, SAFARI)
    assert fallback_order(audio, CHROME, [SAFARI, FIREFOX, CHROME]) == (FIREFOX, SAFARI)
    assert fallback_order(ModelType.TEXT, CHROME, {CHROME}) == ()


# --- the document ---


def table_line(row: Adjustment) -> str:
    browser = "chrome, edge" if row.browser is CHROME else str(row.browser)
    changed = [f"`{argument}`" for argument in row.arguments]
    for settings in (row.preferences, row.environment):
        for name, value in settings.items():
            changed.append(f"`{name}={str(value).lower() if value in (True, False) else value}`")
    instead = f" Instead of: {row.instead_of}." if row.instead_of else ""
    cells = (browser, row.category or "any", row.model_type or "any", " ".join(changed))
    return f"| {' | '.join(cells)} | {row.why}.{instead} |"


def test_document_holds_the_whole_table():
    lines = DOCUMENT.read_text().splitlines()
    expected = [table_line(row) for row in ADJUSTMENTS if row.browser is not EDGE]
    expected += [
        f"| {row.browser or 'any'} | {row.wish} | {row.why} |" for row in WITHOUT_EQUIVALENT
    ]
    missing = [line for line in expected if line not in lines]
    assert not missing, "docs/adjustments.md lacks:\n" + "\n".join(missing)


def test_document_holds_no_row_that_is_gone():
    rows = len(ADJUSTMENTS) - sum(row.browser is EDGE for row in ADJUSTMENTS)
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    heads = 3  # of the two tables above and of that of model types
    assert len(lines) == rows + len(WITHOUT_EQUIVALENT) + len(_model_lines()) + heads
    assert set(_model_lines()) <= set(lines)


def _model_lines() -> list[str]:
    table = DOCUMENT.read_text().partition("## Another browser")[2]
    orders = {kind: f"| {kind} | {', '.join(order)} |" for kind, order in BROWSER_ORDER.items()}
    found = [line for line in table.splitlines() if line.startswith(tuple(orders.values()))]
    assert len(found) == len(ModelType), "a row for each type of model, with its order"
    return found


# --- the installed browsers know every name ---


def unknown_names(files: Iterable[Path], names: Iterable[str]) -> set[str]:
    """Those of `names` that are a C string (or the end of one) in none of `files`."""
    left = {name: name.encode() + b"\0" for name in names}
    overlap = max(map(len, left.values()), default=0)
    piece = 32 << 20
    for file in files:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as m:
            for start in range(0, len(m), piece):
                if not left:
                    return set()
                # A search in bytes takes a tenth of the time of one in the map itself.
                part = m[start : start + piece + overlap]
                left = {name: needle for name, needle in left.items() if needle not in part}
    return set(left)


def browser_file(kind: BrowserType) -> Path:
    if sys.platform != "linux":
        pytest.skip("the names are looked up in the binaries of Linux")
    try:
        return Path(find_binaries(kind).browser).resolve()
    except BrowserMissing as missing:
        pytest.skip(str(missing))


def names_of(arguments: Iterable[str]) -> set[str]:
    """What the binary must know of arguments: switches, features, V8 flags."""
    names = set()
    for argument in arguments:
        switch, _, value = argument.removeprefix("--").partition("=")
        names.add(switch)
        if switch.endswith("able-features"):
            names.update(value.split(","))
        if switch == "js-flags":
            flags = (flag.removeprefix("--").removeprefix("no-") for flag in value.split())
            names.update(flag.replace("-", "_") for flag in flags)
    return names


def test_names_that_the_binary_must_know():
    assert names_of(("--a", "--b=c", "--enable-features=D,E", "--js-flags=--no-f-g")) == {
        *("a", "b", "enable-features", "D", "E", "js-flags", "f_g"),
    }


def test_name_is_looked_up_as_the_end_of_a_string(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"\0kSpare\0disable-gpu-vsync\0")
    two.write_bytes(b"other\0")
    names = {"Spare", "disable-gpu-vsync", "other", "disable-gpu", "ot"}
    assert unknown_names([one, two], names) == {"disable-gpu", "ot"}


@pytest.mark.parametrize("kind", [CHROME, EDGE])
def test_chromium_knows_every_switch_feature_and_flag(kind):
    binary = browser_file(kind)
    with binary.open("rb") as opened:
        wrapper = opened.read(2) == b"#!"  # a vendor's, beside the browser itself
    if wrapper:
        binary = next(
            (p for p in map(binary.with_name, ("chrome", "msedge")) if p.exists()), binary
        )
    arguments = [a for row in ADJUSTMENTS if row.browser is kind for a in row.arguments]
    assert unknown_names([binary], names_of(arguments)) == set()


def test_firefox_knows_every_preference():
    folder = browser_file(FIREFOX).parent
    names = {name for row in ADJUSTMENTS for name in row.preferences}
    names = unknown_names([folder / "libxul.so"], names)
    defaults = "".join(
        archive.read(entry).decode(errors="replace")
        for path in (folder / "omni.ja", folder / "browser" / "omni.ja")
        for archive in [ZipFile(path)]
        for entry in archive.namelist()
        if entry in ("greprefs.js", "defaults/preferences/firefox.js")
    )
    assert {name for name in names if f'"{name}"' not in defaults} == set()


def test_vulkan_loader_and_webkit_know_every_variable():
    folder = browser_file(SAFARI).parent.parent
    libraries = sorted(
        path
        for name in ("libwebkit2gtk-4.?.so.0", "libjavascriptcoregtk-4.?.so.0")
        for path in folder.glob(name)
    )
    names = {name for row in ADJUSTMENTS if row.browser is SAFARI for name in row.environment}
    assert unknown_names(libraries, names) == set()
    folders = ("/usr/lib/*", "/usr/lib", "/usr/lib64")
    loaders = [Path(p) for f in folders for p in glob.glob(f"{f}/libvulkan.so.1")]
    if not loaders:
        pytest.skip("no Vulkan loader is installed")
    names = {name for row in ADJUSTMENTS if row.browser is FIREFOX for name in row.environment}
    assert unknown_names(loaders[:1], names) == set()
