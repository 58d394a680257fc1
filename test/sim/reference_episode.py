"""Plays LIBERO's own environment under OpenVLA's protocol and saves what it saw; run by `test_official_parity`.

usage: reference_episode.py SUITE TASK SEED IMAGE_SIZE ACTIONS.npy OUT.npz INIT_STATE...
In a process of its own, because robosuite's renderer cannot share one.
"""

import os
import sys

import numpy as np


def main(suite: str, task: str, seed: str, size: str, actions: str, out: str, *init_states: str) -> None:
    from libero.libero import benchmark, get_libero_path
    from libero.libero.envs import OffScreenRenderEnv

    tasks = benchmark.get_benchmark(suite)(0)
    found = tasks.get_task(int(task))
    env = OffScreenRenderEnv(
        bddl_file_name=os.path.join(get_libero_path("bddl_files"), found.problem_folder, found.bddl_file),
        camera_heights=int(size),
        camera_widths=int(size),
    )
    saved: dict[str, list[np.ndarray]] = {"states": [], "agentview": [], "robot0_eye_in_hand": [], "proprio": []}

    def save(observation: dict[str, np.ndarray]) -> None:
        saved["states"].append(env.get_sim_state())
        for camera in ("agentview", "robot0_eye_in_hand"):
            saved[camera].append(observation[f"{camera}_image"][::-1])
        names = ("eef_pos", "eef_quat", "gripper_qpos", "joint_pos", "joint_vel")
        saved["proprio"].append(np.concatenate([observation[f"robot0_{name}"] for name in names]))

    for init_state in init_states:
        # LIBERO appends its drawer samplers again at every hard reset; without that, a reset follows from its seed.
        env.env.object_property_initializers = []
        env.seed(int(seed))
        env.env.reset()
        observation = env.set_init_state(tasks.get_task_init_states(int(task))[int(init_state)])
        for _ in range(10):
            observation, *_ = env.step([0] * 6 + [-1])
        save(observation)
        for action in np.load(actions):
            observation, *_ = env.step(action)
            save(observation)
    np.savez(out, **{name: np.array(values) for name, values in saved.items()})  # type: ignore[arg-type]
    env.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
