"""How far the zoo takes what it captures."""

from enum import StrEnum


class Extent(StrEnum):
    """Whether models are quantized and compiled: not at all, up to Inductor's door, or through Inductor.

    SAMPLE: families of every kind the whole way, all others up to the door.
    """

    NONE = "none"
    DOOR = "door"
    SAMPLE = "sample"
    WHOLE = "whole"
