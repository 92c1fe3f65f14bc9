/** Where the servers are, and what the Python client was answered: see tests/clients/test_languages.py. */

import { readFileSync } from "node:fs";

export interface Expected {
  texts: string[];
  embeddings: number[][];
  labels: [string, number][][];
  skill: string;
  answers: string[];
  prompt: string;
  sampling: { temperature: number; seed: number; max_tokens: number };
  text: string;
  model: string;
}

export function setting(name: string): string {
  const value = process.env[name];
  if (!value) {
    throw new Error(`${name} is not set; pytest sets it`);
  }
  return value;
}

export const expected = JSON.parse(readFileSync(setting("UNDERSTUDY_EXPECTED"), "utf8")) as Expected;
export const apiKey = process.env["UNDERSTUDY_API_KEY"];
export const gateway = process.env["UNDERSTUDY_GATEWAY"];
