"""The server of one browser's page: its files and its two sockets."""

from actors.bridge.bridge import Bridge
from actors.bridge.records import PROTOCOL, BridgeEvent, FrameSeen, PageConfig

__all__ = ["PROTOCOL", "Bridge", "BridgeEvent", "FrameSeen", "PageConfig"]
