"""The release bundle: a signed file that holds a run, checked without trust in it, and the run made anew from it.

* archive.py: the container, of which every byte is accounted for;
* manifest.py: names, sizes and hashes; signature.py: who vouches for them;
* make.py: from a run folder to a bundle; bom.py: the bill of materials in it;
* verify.py: what can be checked of a bundle; reproduce.py: the stages run again from its files.

Nothing of a bundle is executed: no code is imported from it, no pickle read, no engine loaded. Checks read its JSON,
safetensors and npz files, and run its ONNX graph in ONNX Runtime on its reference inputs.
"""
