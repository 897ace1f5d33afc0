"""Parts of tools/drill.py: faults drawn at random for a run on this machine, and what became of it.

draw.py       which process, which fault, in which phase: a function of seed and number
scene.py      the processes of one launch and what each is; what a launch has left behind
following.py  a launch that is followed: its lines with their times, and in which phase it is
launch.py     one run of the tiny launcher on this machine, and what it leaves
recorded.py   rollouts that are generated, graded, and then replaced by recorded ones
campaign.py   one drill after another on one folder
faults.py     kill, stop, terminate, take memory away
judge.py      from what was observed to a verdict; knows no processes, so any drill may ask it
exact.py      whether a checkpoint is that of the run nobody disturbed
table.py      verdicts as markdown
"""
