"""Stored codes and float32: quantised weights (`weights`) and containers (`register`).

Containers are one file each in `containers`.

It imports nothing here: the names of the containers are in every command's help, which does not wait for numpy.
"""
