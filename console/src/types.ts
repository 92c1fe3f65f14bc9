// The API's JSON, as protoc-gen-es writes it from protos/. Types alone: nothing of it is in the bundle.
export type { AdapterJson as Adapter } from "./gen/understudy/v1/adapter_pb";
export type { ApiKeyJson as ApiKey, AuditEventJson as AuditEvent } from "./gen/understudy/v1/admin_pb";
export type {
  CreateApiKeyResponseJson as CreatedKey,
  GetCallerResponseJson as Caller,
  ListApiKeysResponseJson as KeyList,
  ListAuditEventsResponseJson as AuditList,
} from "./gen/understudy/v1/admin_service_pb";
export type { RoleJson as Role } from "./gen/understudy/v1/auth_pb";
export type { BudgetJson as Budget } from "./gen/understudy/v1/budget_pb";
export type { CostJson as Cost } from "./gen/understudy/v1/common_pb";
export type { FeedbackJson as Feedback } from "./gen/understudy/v1/feedback_pb";
export type { GenerationTimingsJson as GenerationTimings } from "./gen/understudy/v1/generation_pb";
export type { DecisionJson as Decision, HopJson as Hop, RunResultJson as RunResult } from "./gen/understudy/v1/inference_pb";
export type {
  ClassifyResponseJson as ClassifyAnswer,
  EmbedResponseJson as EmbedAnswer,
  GenerateResponseJson as GeneratePart,
  RunResponseJson as RunAnswer,
} from "./gen/understudy/v1/inference_service_pb";
export type { InteractionJson as Interaction } from "./gen/understudy/v1/interaction_pb";
export type { ModelJson as Model } from "./gen/understudy/v1/model_pb";
export type { ListAdaptersResponseJson as AdapterList, ListModelsResponseJson as ModelList } from "./gen/understudy/v1/model_service_pb";
export type { RolloutEventJson as RolloutEvent, RolloutJson as Rollout } from "./gen/understudy/v1/rollout_pb";
export type { SkillJson as Skill, StudentJson as Student } from "./gen/understudy/v1/skill_pb";
export type {
  GetRolloutResponseJson as RolloutAnswer,
  ListRolloutEventsResponseJson as RolloutEventList,
  ListSkillsResponseJson as SkillList,
} from "./gen/understudy/v1/skill_service_pb";
export type {
  AnsweredByJson as AnsweredBy,
  GetBudgetResponseJson as BudgetAnswer,
  GetStatsResponseJson as Stats,
  GetStatusResponseJson as Status,
  GetTimelineResponseJson as Timeline,
  ListInteractionsResponseJson as InteractionList,
  ProviderStatusJson as ProviderStatus,
  RecordedInteractionJson as RecordedInteraction,
  SkillStatsJson as SkillStats,
  TimelinePointJson as TimelinePoint,
} from "./gen/understudy/v1/stats_service_pb";
export type {
  TrainingJobJson as Job,
  TrainingJobLogLineJson as LogLine,
  TrainingJobMetricJson as JobMetric,
  TrainingJobStateJson as JobState,
} from "./gen/understudy/v1/training_pb";
export type {
  ListTrainingJobMetricsResponseJson as JobMetricList,
  ListTrainingJobsResponseJson as JobList,
  StreamTrainingJobLogsResponseJson as LogPart,
} from "./gen/understudy/v1/training_service_pb";
