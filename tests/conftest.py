"""What holds for all tests: a slow moment of a busy machine is no failure of a property."""

from hypothesis import HealthCheck, settings

settings.register_profile("tabpool", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tabpool")
