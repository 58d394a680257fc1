"""The commanded motion as rviz markers: where each step would take the end effector, reused steps in another colour."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from builtin_interfaces.msg import Time
from geometry_msgs.msg import Point
from std_msgs.msg import ColorRGBA
from visualization_msgs.msg import Marker, MarkerArray

COMPUTED, REUSED = (0.25, 0.6, 1.0, 1.0), (1.0, 0.5, 0.15, 1.0)
LINE_WIDTH, SHAFT, HEAD = 0.003, 0.006, 0.014  # m


@dataclass(frozen=True)
class Move:
    """One commanded displacement. start, end: (3,) m, in the commands' frame."""

    start: np.ndarray
    end: np.ndarray
    reused: bool


class Motion:
    """The newest commanded displacements of an episode."""

    def __init__(self) -> None:
        self.moves: deque[Move] = deque()

    def clear(self) -> None:
        self.moves.clear()

    def add(self, displacement: np.ndarray, reused: bool, position: np.ndarray | None, limit: int) -> None:
        """displacement: (3,) m, of one control step.  position: (3,) m, the end effector's when it was commanded; None
        where nobody says: then the displacements hang together, the first from the frame's origin.  limit: newest kept.
        """
        if position is None:
            position = self.moves[-1].end if self.moves else np.zeros(3)
        self.moves.append(Move(position, position + displacement, reused))
        while len(self.moves) > limit:
            self.moves.popleft()


def marker_array(moves: Iterable[Move], stamp: Time, frame_id: str) -> MarkerArray:
    """A line a move, and an arrow for the newest; they take the place of the array before. A marker that would have no
    points, or an arrow without length, is deleted instead.
    """
    moves = list(moves)
    lines, arrow = _marker(0, Marker.LINE_LIST, stamp, frame_id), _marker(1, Marker.ARROW, stamp, frame_id)
    lines.scale.x = LINE_WIDTH
    lines.action = Marker.ADD if moves else Marker.DELETE
    arrow.scale.x, arrow.scale.y, arrow.scale.z = SHAFT, HEAD, HEAD
    for move in moves:
        lines.points += [_point(move.start), _point(move.end)]
        lines.colors += [_colour(move)] * 2
    if moves and np.any(moves[-1].end != moves[-1].start):
        arrow.points, arrow.color = [_point(moves[-1].start), _point(moves[-1].end)], _colour(moves[-1])
    else:
        arrow.action = Marker.DELETE
    return MarkerArray(markers=[lines, arrow])


def _marker(number: int, kind: int, stamp: Time, frame_id: str) -> Marker:
    marker = Marker(ns="commanded", id=number, type=kind, action=Marker.ADD)
    marker.header.stamp, marker.header.frame_id = stamp, frame_id
    marker.pose.orientation.w = 1.0
    return marker


def _point(place: np.ndarray) -> Point:
    x, y, z = (float(value) for value in place)
    return Point(x=x, y=y, z=z)


def _colour(move: Move) -> ColorRGBA:
    red, green, blue, alpha = REUSED if move.reused else COMPUTED
    return ColorRGBA(r=red, g=green, b=blue, a=alpha)
