/** The client, over any connection: the stubs of every service, and shorter words for what is asked most. */

import type { MessageInitShape } from "@bufbuild/protobuf";
import { createClient, type CallOptions, type Client, type Transport } from "@connectrpc/connect";

import { fromStatus } from "./errors.js";
import { AdminService } from "./gen/understudy/v1/admin_service_pb.js";
import { EnsembleService } from "./gen/understudy/v1/ensemble_service_pb.js";
import { Thumb, type Feedback, type FeedbackSchema } from "./gen/understudy/v1/feedback_pb.js";
import { FeedbackService } from "./gen/understudy/v1/feedback_service_pb.js";
import {
  InferenceService,
  type ClassifyRequestSchema,
  type EmbedRequestSchema,
  type GenerateRequestSchema,
  type GenerateResponse,
  type RunRequestSchema,
} from "./gen/understudy/v1/inference_service_pb.js";
import type { Label, RunResult } from "./gen/understudy/v1/inference_pb.js";
import { ModelService } from "./gen/understudy/v1/model_service_pb.js";
import { SkillService } from "./gen/understudy/v1/skill_service_pb.js";
import { StatsService } from "./gen/understudy/v1/stats_service_pb.js";
import { TrainingService } from "./gen/understudy/v1/training_service_pb.js";
import { withPolicy, type Policy } from "./policy.js";

/** What a request holds besides its texts, by the names of the protos in lowerCamelCase; `timeoutMs`, `signal`, `headers` go apart. */
type Rest<T, K extends string> = Omit<T, K | "$typeName" | "$unknown">;

export type GenerateInput = MessageInitShape<typeof GenerateRequestSchema>;
export type EmbedInput = Rest<MessageInitShape<typeof EmbedRequestSchema>, "texts">;
export type ClassifyInputs = Rest<MessageInitShape<typeof ClassifyRequestSchema>, "inputs">;
export type RunInputs = Rest<MessageInitShape<typeof RunRequestSchema>, "skill" | "inputs">;
export type FeedbackInput = Rest<MessageInitShape<typeof FeedbackSchema>, "interactionId">;

/**
 * One connection. Every call throws UnderstudyError, and takes `{ timeoutMs, signal, headers }` last. The stubs take and give the messages
 * of the protos; they go through the same deadlines, retries and errors.
 */
export class UnderstudyClient {
  readonly inference: Client<typeof InferenceService>;
  readonly feedbackService: Client<typeof FeedbackService>;
  readonly skills: Client<typeof SkillService>;
  readonly models: Client<typeof ModelService>;
  readonly training: Client<typeof TrainingService>;
  readonly stats: Client<typeof StatsService>;
  readonly ensembles: Client<typeof EnsembleService>;
  readonly admin: Client<typeof AdminService>;
  readonly #close: () => void;

  constructor(transport: Transport, policy: Policy, close: () => void = () => undefined) {
    const shared = withPolicy(transport, policy);
    this.inference = createClient(InferenceService, shared);
    this.feedbackService = createClient(FeedbackService, shared);
    this.skills = createClient(SkillService, shared);
    this.models = createClient(ModelService, shared);
    this.training = createClient(TrainingService, shared);
    this.stats = createClient(StatsService, shared);
    this.ensembles = createClient(EnsembleService, shared);
    this.admin = createClient(AdminService, shared);
    this.#close = close;
  }

  /** A vector for each text, in order. Throws the first item's error where one has none. */
  async embed(texts: readonly string[], more: EmbedInput = {}, options?: CallOptions): Promise<Float32Array[]> {
    const { results } = await this.inference.embed({ ...more, texts: [...texts] }, options);
    return results.map((one) => {
      if (one.error) {
        throw fromStatus(one.error);
      }
      return Float32Array.from(one.embedding);
    });
  }

  /** The classes of each text, best first. Throws the first item's error where one has none. */
  async classify(texts: readonly string[], more: ClassifyInputs = {}, options?: CallOptions): Promise<Label[][]> {
    const { results } = await this.inference.classify({ ...more, inputs: texts.map((text) => ({ text })) }, options);
    return results.map((one) => {
      if (one.error) {
        throw fromStatus(one.error);
      }
      return one.labels;
    });
  }

  /** A skill's answers with their route, cost, quality and interaction id; of an item that failed, `error` is set. */
  async run(skill: string, texts: readonly string[], more: RunInputs = {}, options?: CallOptions): Promise<RunResult[]> {
    const inputs = texts.map((text) => ({ input: { case: "text" as const, value: text } }));
    return (await this.inference.run({ ...more, skill, inputs }, options)).results;
  }

  /** An answer as it is written. Leaving the loop ends the work. */
  async *generate(request: GenerateInput, options: CallOptions = {}): AsyncGenerator<GenerateResponse, void, undefined> {
    const leaving = new AbortController();
    const signal = options.signal ? AbortSignal.any([options.signal, leaving.signal]) : leaving.signal;
    const messages = this.inference.generate(request, { ...options, signal })[Symbol.asyncIterator]();
    let over = false;
    const next = async (): Promise<GenerateResponse | undefined> => {
      over = true; // where it throws
      const { done, value } = await messages.next();
      over = done === true;
      return done ? undefined : value;
    };
    try {
      for (let message = await next(); message !== undefined; message = await next()) {
        yield message;
      }
    } finally {
      leaving.abort();
      // Connect lets go of the call, and of its timer, when it is asked for the next message.
      while (!over) {
        await next().catch(() => undefined);
      }
    }
  }

  /** Says something of an answer. It is kept once, however often it has to be sent. */
  async feedback(interactionId: string, said: FeedbackInput, options?: CallOptions): Promise<Feedback> {
    const request = { feedback: { ...said, interactionId }, requestId: randomId() };
    const { feedback } = await this.feedbackService.createFeedback(request, options);
    if (feedback === undefined) {
      throw new TypeError("the server kept the feedback and did not say as what");
    }
    return feedback;
  }

  /** Ends the connection, and the calls on it. */
  close(): void {
    this.#close();
  }
}

/** As crypto.randomUUID, which pages without encryption do not have. */
function randomId(): string {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export { Thumb };
