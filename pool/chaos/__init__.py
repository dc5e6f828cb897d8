"""Real operations on real browsers that are broken on purpose: `tabpool chaos`.

`records` says what is kept of a run, `runner` makes one, `evidence` tells whether a fault really
happened, `report` and `charts` show it, `matrix` is one small run for each kind of browser, model,
platform and failure. Nothing here runs unless it is asked for.
"""
