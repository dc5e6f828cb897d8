"""The launch adjustments by browser, failure and model type: the rows of the AGGRESSIVE rung.

A row of `ADJUSTMENTS` says: for this browser, failure category and model type, launch with these
arguments, preferences and environment, because of this. The requirements come from the
documents that specify these rungs; `instead_of` names a required argument that no longer exists or
would do harm, and `WITHOUT_EQUIVALENT` those without any equivalent. A unit test looks every name
up in the installed browsers. This module must not choose among its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from recovery.failures import Category
from recovery.kinds import BrowserType, ModelType

PreferenceValue = bool | int | str


@dataclass(frozen=True)
class Adjustment:
    """One row. A category or model type of None means any."""

    browser: BrowserType
    category: Category | None
    model_type: ModelType | None
    arguments: tuple[str, ...] = ()
    preferences: Mapping[str, PreferenceValue] = field(default_factory=dict)  # Firefox only
    environment: Mapping[str, str] = field(default_factory=dict)
    why: str = field(kw_only=True)
    instead_of: str = ""  # the required argument

    def applies(self, browser: BrowserType, model_type: ModelType, category: Category) -> bool:
        return (
            self.browser is browser
            and self.category in (None, category)
            and self.model_type in (None, model_type)
        )


@dataclass(frozen=True)
class Unfulfilled:
    """A wish that nothing about a launch fulfils. A browser of None means any."""

    browser: BrowserType | None
    wish: str
    why: str


_CHROME, _FIREFOX, _SAFARI, _EDGE = (
    BrowserType.CHROME,
    BrowserType.FIREFOX,
    BrowserType.SAFARI,
    BrowserType.EDGE,
)

# Within a browser the rows of a model type come first: later rows win, and the failure knows best.
_CHROMIUM_ROWS = (
    Adjustment(
        _CHROME,
        None,
        ModelType.TEXT,
        ("--enable-features=WebMachineLearningNeuralNetwork",),
        why="WebNN is one of the back ends that the page can try, also where the GPU is off",
    ),
    Adjustment(
        _CHROME,
        None,
        ModelType.TEXT,
        ("--gpu-disk-cache-size-kb=65536",),
        why="a compiled shader stays cached (6 MB hold few of a model's), for its next load",
        instead_of="shader precompilation",
    ),
    Adjustment(
        _CHROME,
        None,
        ModelType.VISION,
        ("--use-webgpu-power-preference=force-high-performance",),
        why="of two GPUs the faster one computes: vision is after throughput",
    ),
    Adjustment(
        _CHROME,
        None,
        ModelType.VISION,
        ("--gpu-disk-cache-size-kb=65536",),
        why="a compiled shader stays cached (6 MB hold few of a model's), for its next load",
        instead_of="shader precompilation",
    ),
    Adjustment(
        _CHROME,
        None,
        ModelType.AUDIO,
        ("--use-webgpu-power-preference=force-high-performance",),
        why="of two GPUs the faster one computes",
    ),
    Adjustment(
        _CHROME,
        None,
        ModelType.MULTIMODAL,
        ("--disable-features=SpareRendererForSitePerProcess",),
        why="no renderer is kept ready for a page that will never come: several models need memory",
    ),
    Adjustment(
        _CHROME,
        Category.RESOURCE_EXHAUSTION,
        None,
        ("--disable-gpu-rasterization", "--disable-gpu-vsync"),
        why="nothing is drawn on the GPU and no frame is waited for: its memory is for models",
    ),
    Adjustment(
        _CHROME,
        Category.RESOURCE_EXHAUSTION,
        None,
        ("--disable-features=SpareRendererForSitePerProcess",),
        why="the spare renderer goes, as on a low-end device. The mode itself would pretend a "
        "machine of 512 MB, and cap the JavaScript heap by that",
        instead_of="low-end device mode",
    ),
    Adjustment(
        _CHROME,
        Category.RESOURCE_EXHAUSTION,
        None,
        ("--disable-dev-shm-usage",),
        why="shared buffers go to the temporary directory: /dev/shm is small in containers",
    ),
    Adjustment(
        _CHROME,
        Category.GPU_ERROR,
        None,
        ("--disable-gpu-process-crash-limit", "--disable-gpu-watchdog"),
        why="a GPU process that crashes starts again each time, and one long kernel is no hang",
    ),
    Adjustment(
        _CHROME,
        Category.GPU_ERROR,
        None,
        ("--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"),
        why="the adapter that failed is left: back end auto then takes WASM, a forced WebGPU "
        "computes in software. Where the GPU is switched off this switches nothing on",
    ),
    Adjustment(
        _CHROME,
        Category.API_ERROR,
        None,
        (
            "--enable-features=WebMachineLearningNeuralNetwork",
            "--enable-features=ExperimentalWebMachineLearningNeuralNetwork",
        ),
        why="WebNN, with its newest operators: one more back end that may know the operator",
        instead_of="the WebNN extension in Dawn",
    ),
    Adjustment(
        _CHROME,
        Category.API_ERROR,
        None,
        ("--ignore-gpu-blocklist",),
        why="an adapter that is only missing because a list says so is tried",
    ),
    Adjustment(
        _CHROME,
        Category.CRASH,
        None,
        ("--disable-breakpad",),
        why="no dump of the crash is written first, so the death is seen at once",
        instead_of="disable crash reporter (that switch is gone)",
    ),
    Adjustment(
        _CHROME,
        Category.CRASH,
        None,
        ("--js-flags=--no-wasm-tier-up --no-wasm-dynamic-tiering",),
        why="WASM runs as the baseline compiler makes it: neither the optimising compiler, nor "
        "its memory, nor code that it left in the profile can be the cause. Three times slower",
    ),
    Adjustment(
        _CHROME,
        Category.CRASH,
        None,
        ("--disable-dev-shm-usage",),
        why="a full /dev/shm kills the renderer, and looks like any crash",
    ),
    Adjustment(
        _CHROME,
        Category.LAUNCH_FAILURE,
        None,
        ("--disable-breakpad", "--disable-dev-shm-usage"),
        why="neither the crash handler nor /dev/shm is needed to start",
    ),
)

_FIREFOX_ROWS = (
    Adjustment(
        _FIREFOX,
        None,
        ModelType.AUDIO,
        preferences={"gfx.webgpu.ignore-blocklist": True},
        why="WebGPU, which audio prefers here, is not refused because of a list",
    ),
    Adjustment(
        _FIREFOX,
        None,
        ModelType.MULTIMODAL,
        preferences={
            "browser.cache.memory.capacity": 32 * 1024,  # KiB
            "dom.ipc.processPrelaunch.enabled": False,
        },
        why="a small memory cache and no process kept ready: several models need memory",
    ),
    Adjustment(
        _FIREFOX,
        Category.RESOURCE_EXHAUSTION,
        None,
        preferences={
            "browser.cache.memory.capacity": 32 * 1024,  # KiB
            "browser.sessionhistory.max_entries": 2,
            "browser.sessionhistory.max_total_viewers": 0,
        },
        why="32 MB of memory cache, no history and no page kept for going back",
    ),
    Adjustment(
        _FIREFOX,
        Category.RESOURCE_EXHAUSTION,
        None,
        preferences={"dom.ipc.processPrelaunch.enabled": False},
        why="no content process is kept ready for a page that will never come",
    ),
    Adjustment(
        _FIREFOX,
        Category.GPU_ERROR,
        None,
        preferences={"gfx.webgpu.ignore-blocklist": True, "dom.webgpu.allow-in-parent": True},
        why="WebGPU stays on a blocklisted adapter, and when the GPU process has given up",
        instead_of="unsafe WebGPU operations",
    ),
    Adjustment(
        _FIREFOX,
        Category.GPU_ERROR,
        None,
        preferences={"gfx.webrender.software": True},
        why="drawing leaves the GPU to the computation",
        instead_of="disable WebRender (nothing else is left that draws)",
    ),
    Adjustment(
        _FIREFOX,
        Category.GPU_ERROR,
        None,
        environment={"VK_LOADER_DRIVERS_SELECT": "lvp_*"},
        why="the adapter that failed is left for Mesa's software one (Linux); where that is not "
        "installed there is none, and back end auto takes WASM",
    ),
    Adjustment(
        _FIREFOX,
        Category.API_ERROR,
        None,
        preferences={"gfx.webgpu.ignore-blocklist": True, "dom.webgpu.allow-in-parent": True},
        why="an adapter that is missing only because of a list or of the GPU process is tried",
    ),
    Adjustment(
        _FIREFOX,
        Category.CRASH,
        None,
        preferences={"dom.ipc.processCount": 1, "dom.ipc.processPrelaunch.enabled": False},
        why="as few content processes as there can be",
        instead_of="disable multiprocess tabs",
    ),
    Adjustment(
        _FIREFOX,
        Category.CRASH,
        None,
        preferences={"javascript.options.wasm_optimizingjit": False},
        why="WASM runs as the baseline compiler makes it: neither the optimising compiler nor its "
        "memory can be the cause. Slower",
    ),
    Adjustment(
        _FIREFOX,
        Category.LAUNCH_FAILURE,
        None,
        preferences={"gfx.webrender.software": True, "dom.ipc.forkserver.enable": False},
        why="neither a graphics driver nor the fork server is needed to start",
    ),
)

_SAFARI_ROWS = (
    Adjustment(
        _SAFARI,
        Category.RESOURCE_EXHAUSTION,
        None,
        environment={"JSC_criticalGCMemoryThreshold": "0.5"},
        why="the collector works its hardest from half the memory in use, not from 80 %",
    ),
    Adjustment(
        _SAFARI,
        Category.CRASH,
        None,
        environment={"JSC_useOMGJIT": "false"},
        why="WASM runs as the baseline compiler makes it: neither the optimising compiler nor its "
        "memory can be the cause. Slower",
    ),
    Adjustment(
        _SAFARI,
        Category.LAUNCH_FAILURE,
        None,
        environment={"WEBKIT_DISABLE_DMABUF_RENDERER": "1"},
        why="no graphics driver is needed to start",
    ),
)

ADJUSTMENTS: tuple[Adjustment, ...] = (
    *_CHROMIUM_ROWS,
    *_FIREFOX_ROWS,
    *_SAFARI_ROWS,
    *(replace(row, browser=_EDGE) for row in _CHROMIUM_ROWS),  # Edge is Chromium
)

WITHOUT_EQUIVALENT: tuple[Unfulfilled, ...] = (
    Unfulfilled(
        _CHROME,
        "Zero copy of images",
        "--enable-zero-copy is about the tiles that pages are drawn in. For tensors it is a "
        "session option of onnxruntime-web (preferredOutputLocation), not an argument.",
    ),
    Unfulfilled(
        _CHROME,
        "GPU memory buffers for video frames",
        "The switch exists, but a model is fed tensors; no video frame is ever made.",
    ),
    Unfulfilled(
        _CHROME,
        "Compute shader workgroup size 128x2x1 (audio)",
        "onnxruntime-web writes its shaders itself and has no setting for it.",
    ),
    Unfulfilled(
        _FIREFOX,
        "Compute shader workgroup size 256x1x1 (audio)",
        "onnxruntime-web writes its shaders itself and has no setting for it.",
    ),
    Unfulfilled(
        _FIREFOX,
        "Compute shader optimisations for audio",
        "Firefox has no preference that makes compute shaders faster.",
    ),
    Unfulfilled(
        _FIREFOX,
        "Shader precompilation",
        "gfx.webrender.precache-shaders is about drawing. WebGPU shaders are compiled by the "
        "warm-up of a load, and kept nowhere.",
    ),
    Unfulfilled(
        _FIREFOX,
        "Single process mode",
        "No preference does it any more. MOZ_FORCE_DISABLE_E10S must name the exact version, and a "
        "page in the parent process is not cross-origin isolated: no threads.",
    ),
    Unfulfilled(
        _SAFARI,
        "Anything after a GPU or API error",
        "WebKitGTK has no WebGPU and no WebNN, and its WASM cannot be told to know more. The "
        "adjustment is empty, so the next rung comes.",
    ),
    Unfulfilled(
        _SAFARI,
        "Anything on macOS",
        "safaridriver passes on neither arguments nor environment.",
    ),
    Unfulfilled(
        _EDGE,
        "WebNN compile options",
        "The web has no such option: a page gives a device type and a power preference.",
    ),
    Unfulfilled(
        None,
        "Tensor sharing across components",
        "Belongs to the models and the page that runs them, not to a launch.",
    ),
    Unfulfilled(
        None,
        "Memory usage monitoring",
        "Belongs to the supervisor, not to a launch.",
    ),
)
