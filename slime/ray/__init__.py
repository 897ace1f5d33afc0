"""The hall: Ray actors that hold the rooms together.

placement      which device slots the trainer and the engines get
train_actor    one trainer rank; train_group: all of them, as one
engine_actor   one serving engine's process; rollout_actor: engines, router, data and rewards, as one
lease          who holds the devices now, and the one legal order of handing them over
The driver (`slime.train`) calls down into these; none of them calls up, and trainer ranks hold no actor handles.
"""
