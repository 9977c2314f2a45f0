"""Exporting: a trained encoder as a folder that Hugging Face transformers loads.

    run, checkpoint, other weights --writer.py--> OUT/
      config.json, model.safetensors       the encoder, and the head of a fine-tuned model
      predictors.safetensors               for further pre-training; transformers ignores it
      preprocessor_config.json, tokenizer  how the inputs are made
      *_d2v.py                             the model, if transformers has no class for it
      README.md                            the model card

    OUT --verify.py: transformers in a fresh process--> the largest difference from our encoder

stock.py maps data2vec 1.0 to the classes of transformers; own_code.py packs everything else with
the files of remote/. Those files are copied as they are and import nothing of d2v_ds.
"""
