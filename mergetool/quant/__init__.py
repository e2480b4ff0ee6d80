"""Stored codes and float32: which weights of a file are quantised (`weights`), and the containers (`register`), one file each in `containers`.

It imports nothing here: the names of the containers are in every command's help, which does not wait for numpy.
"""
