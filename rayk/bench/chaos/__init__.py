"""Faults on purpose, while a benchmark runs: `rayk bench --chaos kill-replica:2/min,fill-disk:1/min --seed 7`.

    schedule.py   which fault comes when, from a specification and a seed alone
    injector.py   a thread that injects them, and notes when each is over
    targets.py    what there is to be hit: processes and sockets of a manager or of a Cluster
    disk.py       pages of the disk tier damaged, its file system frozen or filled
    nodes.py      simulated nodes of this machine, to be killed
    neighbour.py  a process of its own: another driver of the same cluster, to be killed
    undisturbed.py  the same requests without faults, for comparison

Nothing in the product knows of it: processes get signals, files other bytes, sockets are shut down.
"""
