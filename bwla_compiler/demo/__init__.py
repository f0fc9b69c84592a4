"""The embedded model: a small real LM that the package trains once, offline."""

from bwla_compiler.demo.config import DemoConfig
from bwla_compiler.demo.model import NAMES, DemoModel, demo_path, demo_tokens, is_demo, load_demo

__all__ = ["NAMES", "DemoConfig", "DemoModel", "demo_path", "demo_tokens", "is_demo", "load_demo"]
