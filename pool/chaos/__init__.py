"""Fault injection into real browsers under load: `tabpool chaos`.

`plan` describes a run, `runner` carries it out and `records` holds its results: `asking` sends the
operations, `injections` triggers the faults, `observer`, `control_log` (with `clock`), `watch`
(with `processes`) and `memory` observe, `attribution` assigns observations to faults, and
`evidence` decides whether a fault really happened. `report` and `charts` show a run, `matrix` does
a small run for each kind of browser, model, platform and failure.
"""
