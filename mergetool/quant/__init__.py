"""Stored codes and float32: find quantised weights, read and write their containers.

Containers are one file each in `containers`.

It imports nothing here: the names of the containers are in every command's help, which does not wait for numpy.
"""
