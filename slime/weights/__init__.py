"""From trained parameters to what the engines serve.

In:  the training parameters of one rank, and which engine ranks keep what (`serving`).
Out: a plan of which bytes go where (`plan`), carried out by all ranks (`execute`, `parts`); `WeightBucket`s in the engines'
     format (block FP8 with scales where the serving checkpoint is FP8); and the order of the steps that makes an engine change
     version: pause, flush, begin, stream, end, check, continue (`protocol`).
Never: process handles, HTTP, SGLang. The hall (`slime.ray`) carries the bytes to the engines.
"""
