"""Real operations on real browsers that are broken on purpose: `tabpool chaos`.

`plan` says what a run is asked for, `runner` makes one and `records` says what is kept of it:
`asking` asks the operations, `injections` has the faults made, `observer`, `control_log` (with
`clock`), `watch` (with `processes`) and `memory` look on, `attribution` says what came of which
fault, and `evidence` whether it really happened. `report` and `charts` show a run, `matrix` is one
small run for each kind of browser, model, platform and failure. Nothing here runs unless it is
asked for.
"""
