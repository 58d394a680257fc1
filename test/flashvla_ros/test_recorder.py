"""Recording: what is on disk is what was sent, and a disk that is full says so."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from sensor_msgs.msg import Image
from std_msgs.msg import String

from flashvla_ros.errors import RecordingError
from flashvla_ros.messages import image_message, to_stamp
from flashvla_ros.recorder import Recorder

CAMERAS = ("/left/image_raw", "/right/image_raw")
TOPICS = {CAMERAS[0]: Image, CAMERAS[1]: Image, "/words": String}

# Publishes images to a recorder in the same process until one of them gives up, and says which.
FULL_DISK = """
import sys
from pathlib import Path
import numpy as np
import rclpy
from rclpy.executors import SingleThreadedExecutor
from rclpy.node import Node
from sensor_msgs.msg import Image
from flashvla_ros.messages import image_message, to_stamp
from flashvla_ros.recorder import Recorder

rclpy.init()
recorder = Recorder(Path(sys.argv[1]), {"/image": Image}, ("/image",))
node = Node("camera")
publisher = node.create_publisher(Image, "/image", 100)
executor = SingleThreadedExecutor()
executor.add_node(recorder)
while not publisher.get_subscription_count():
    executor.spin_once(timeout_sec=0.1)
rng = np.random.default_rng(0)
for number in range(1, 200):
    image = rng.integers(0, 256, (64, 64, 3), np.uint8)
    publisher.publish(image_message(image, to_stamp(number), "camera"))
    executor.spin_once(timeout_sec=1.0)
    if recorder.error:
        break
recorder.close()
print(recorder.error)
"""


def image(number: int, camera: int) -> np.ndarray:
    return np.full((48, 64, 3), (number * 20 + camera * 100) % 256, np.uint8)


def test_bag_and_video_hold_every_message_in_order_with_its_stamp(ros, tmp_path):
    recorder = Recorder(tmp_path, TOPICS, CAMERAS, context=ros.context)
    ros.add(recorder)
    publishers = [ros.node.create_publisher(Image, topic, 100) for topic in CAMERAS]
    words = ros.node.create_publisher(String, "/words", 100)
    for publisher in (*publishers, words):
        ros.connected(publisher)
    for number in range(10):
        for camera, publisher in enumerate(publishers):
            publisher.publish(image_message(image(number, camera), to_stamp(number * 50_000_000), "camera"))
        words.publish(String(data=f"step {number}"))
    ros.wait(lambda: all(count == 10 for count in recorder.counts.values()))
    recorder.close()
    recorder.destroy_node()
    assert recorder.error is None
    with AnyReader([tmp_path / "bag"]) as bag:
        assert {c.topic: c.msgcount for c in bag.connections} == dict.fromkeys(TOPICS, 10)
        for camera, topic in enumerate(CAMERAS):
            connections = [c for c in bag.connections if c.topic == topic]
            for number, (connection, _, data) in enumerate(bag.messages(connections)):
                message = bag.deserialize(data, connection.msgtype)
                assert message.header.stamp.nanosec == number * 50_000_000
                np.testing.assert_array_equal(message.data.reshape(48, 64, 3), image(number, camera))
    with av.open(str(tmp_path / "cameras.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 10
    assert frames[3].shape == (48, 128, 3)
    np.testing.assert_allclose(frames[3][:, 8:56].mean(), image(3, 0).mean(), atol=4)
    np.testing.assert_allclose(frames[3][:, 72:120].mean(), image(3, 1).mean(), atol=4)


def test_full_disk_ends_the_recording_with_an_error_and_not_the_node(tmp_path, ros_environment):
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / "run")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "recording to" in result.stdout
    assert "stopped: [Errno 27] File too large; what came before is kept" in result.stdout


def test_folder_that_cannot_be_written_is_named(ros, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.raises(RecordingError, match=str(blocked)):
        Recorder(blocked / "run", TOPICS, context=ros.context)


def test_existing_recording_is_not_overwritten(ros, tmp_path):
    Path(tmp_path / "bag").mkdir()
    with pytest.raises(RecordingError, match="bag"):
        Recorder(tmp_path, TOPICS, context=ros.context)
