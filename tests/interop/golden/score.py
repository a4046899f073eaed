# SPDX-License-Identifier: Apache-2.0
"""What transformers makes of folders: logits, ids of texts, greedy tokens.

  python score.py JOBS.json OUT

JOBS is a list of objects: `name`; `folder`, loaded as its config.json says;
`tokens` [B, T]; `texts`; `prompt` and `new_tokens`. OUT gets NAME.safetensors
with float32 `logits` [B, T, V], and NAME.json with `architecture`, `ids` of
each text, those `decoded` again, and the `generated` ids.
"""

import json
import os
from pathlib import Path
import sys

os.environ['TORCHDYNAMO_DISABLE'] = '1'
# Folders are on this disk; a name that is none must not be looked up.
os.environ['HF_HUB_OFFLINE'] = '1'

import safetensors.torch
import torch
import transformers


def score(job: dict, out: Path):
  folder, name = job['folder'], job['name']
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  with torch.no_grad():
    logits = model(torch.tensor(job['tokens'])).logits.float()
  safetensors.torch.save_file(
    {'logits': logits.contiguous()}, out / f'{name}.safetensors'
  )
  prompt = tokenizer(job['prompt'], return_tensors='pt')
  generated = model.generate(**prompt, max_new_tokens=job['new_tokens'])
  ids = [tokenizer(text)['input_ids'] for text in job['texts']]
  result = {
    'architecture': type(model).__name__,
    'dtype': str(model.dtype),
    'ids': ids,
    'decoded': [tokenizer.decode(row) for row in ids],
    'generated': generated[0].tolist(),
    'end': tokenizer.eos_token_id,
  }
  (out / f'{name}.json').write_text(json.dumps(result))


def main():
  jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
  torch.set_num_threads(1)
  transformers.logging.set_verbosity_error()
  transformers.logging.disable_progress_bar()
  for job in jobs:
    score(job, out)


if __name__ == '__main__':
  main()
