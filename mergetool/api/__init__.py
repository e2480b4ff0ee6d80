"""The only runner: every command as a function, ``mergetool.merge`` and the rest.

    import mergetool

    mergetool.merge("alkahest + 20 * (artshoot - 'z-image')", "out.safetensors", protect=["refiner"])
    mergetool.diff("alkahest", "turbo", "turbo.lora.safetensors", rank_thresh=0.995, exclude=["refiner"])
    mergetool.compare("z-image", "artshoot", reference="sharper").advice
    picture = mergetool.sample("a blue circle on a gold background", base="lab.base", refiner="lab.turbo")[0].image
    assert mergetool.verify("out.safetensors", images=False).passed
    mergetool.Recipe("bridge.yaml", m=20).make("outputs")

Models are what the command line takes: registered names, paths, ``hf://`` addresses, ``lab.NAME``. Every error is a MergetoolError with
one sentence. ``progress=True`` shows a bar on stderr; a function is called with what is done and the total instead.
"""
