"""The table of faults: what each kind does to a browser. A new one is a function and a row here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping

from actors.injection import on_page, on_processes, on_server, on_worker
from actors.injection.target import Hit, Injection
from recovery.faults import FaultKind

Action = Callable[[Injection], Awaitable[Hit]]

ACTIONS: Mapping[FaultKind, Action] = {
    FaultKind.LAUNCH_FAILURE: on_processes.fail_launch,
    FaultKind.CONNECTION_FAILURE: on_server.go_out_of_reach,
    FaultKind.TIMEOUT: on_processes.hang,
    FaultKind.TAB_CRASH: on_processes.crash_tab,
    FaultKind.BROWSER_CRASH: on_processes.crash_browser,
    FaultKind.GPU_PROCESS_CRASH: on_processes.crash_gpu_process,
    FaultKind.DEVICE_LOSS: on_page.lose_device,
    FaultKind.MEMORY_EXHAUSTION: on_page.exhaust_memory,
    FaultKind.DRIVER_DEATH: on_processes.kill_driver,
    FaultKind.SOCKET_DROP: on_server.drop_sockets,
    FaultKind.API_ERROR: on_server.spoil_model_files,
    FaultKind.WRONG_ANSWER: on_page.corrupt_answers,
    FaultKind.PAGE_REFRESH: on_page.refresh_page,
    FaultKind.TAB_HIDDEN: on_page.hide_tab,
    FaultKind.MACHINE_SUSPENDED: on_processes.suspend_machine,
    FaultKind.MESSAGE_OVER_LIMIT: on_page.send_too_much,
    FaultKind.WORKER_DEATH: on_worker.end_worker,
    FaultKind.NODE_DEATH: on_worker.end_node,
}
