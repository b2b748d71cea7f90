"""Publishing SeqBoat models on the Hugging Face Hub: `build_folder`, `verify_folder`, `push_folder`, and
`convert_checkpoint` for the published checkpoints, each in the module of its name. The command line is
`seqboat`, or `python -m hub_upload`.
"""
