package dev.understudy;

import dev.understudy.v1.AdminServiceGrpc;
import dev.understudy.v1.CreateFeedbackRequest;
import dev.understudy.v1.EmbedRequest;
import dev.understudy.v1.EmbedResult;
import dev.understudy.v1.EnsembleServiceGrpc;
import dev.understudy.v1.Feedback;
import dev.understudy.v1.FeedbackServiceGrpc;
import dev.understudy.v1.GenerateRequest;
import dev.understudy.v1.InferenceServiceGrpc;
import dev.understudy.v1.ModelServiceGrpc;
import dev.understudy.v1.RunInput;
import dev.understudy.v1.RunRequest;
import dev.understudy.v1.RunResult;
import dev.understudy.v1.SkillServiceGrpc;
import dev.understudy.v1.StatsServiceGrpc;
import dev.understudy.v1.TrainingServiceGrpc;
import io.grpc.Channel;
import io.grpc.ChannelCredentials;
import io.grpc.ClientInterceptors;
import io.grpc.Context;
import io.grpc.Deadline;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.AbstractStub;
import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.UUID;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.function.Function;

/**
 * One connection to a server, for any number of threads. Its methods throw {@link UnderstudyException}. The stubs take and
 * give the messages of the protos; {@link #call} gives them the same retries and errors.
 */
public final class Client implements AutoCloseable {
  private final ManagedChannel connection;
  private final Channel channel;
  private final Builder options;

  private Client(ManagedChannel connection, Builder options) {
    this.connection = connection;
    this.channel = ClientInterceptors.intercept(connection, new Policy(options.headers(), options.timeout));
    this.options = options;
  }

  /** A client without encryption and without a key, of the server at an address such as "127.0.0.1:50051". */
  public static Client connect(String address) {
    return builder(address).connect();
  }

  /** Options of a connection. */
  public static Builder builder(String address) {
    return new Builder(address);
  }

  /** Options of a connection to one server. */
  public static final class Builder {
    private final String address;
    private ChannelCredentials credentials = InsecureChannelCredentials.create();
    private String apiKey = "";
    private Duration timeout = Duration.ofSeconds(60);
    private int attempts = 4;
    private final Metadata metadata = new Metadata();

    private Builder(String address) {
      this.address = address;
    }

    /** A key that is sent with every call as a bearer token; null or empty: none. */
    public Builder apiKey(String value) {
      apiKey = value == null ? "" : value;
      return this;
    }

    /** Encryption, for example {@code TlsChannelCredentials.newBuilder().trustManager(file).build()}. */
    public Builder tls(ChannelCredentials value) {
      credentials = value;
      return this;
    }

    /**
     * Bounds calls that have no deadline of their own, with all their attempts; 60 s by default. Other streams than
     * Generate's have no such bound.
     */
    public Builder timeout(Duration value) {
      timeout = value;
      return this;
    }

    /** How often a call is sent at most, the first time included; 4 by default, 1: once. Streams are sent once. */
    public Builder attempts(int value) {
      attempts = value;
      return this;
    }

    /** Sent with every call. */
    public Builder metadata(String key, String value) {
      metadata.put(Metadata.Key.of(key, Metadata.ASCII_STRING_MARSHALLER), value);
      return this;
    }

    /** The client. Nothing is sent before the first call. */
    public Client connect() {
      // Answers are as large as the caller asked for. gRPC's own retries are off: ours know the reasons.
      ManagedChannel connection =
          Grpc.newChannelBuilder(address, credentials).maxInboundMessageSize(Integer.MAX_VALUE).disableRetry().build();
      return new Client(connection, this);
    }

    private Metadata headers() {
      Metadata all = new Metadata();
      all.merge(metadata);
      if (!apiKey.isEmpty()) {
        all.put(Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER), "Bearer " + apiKey);
      }
      return all;
    }
  }

  /** The stub of InferenceService. */
  public InferenceServiceGrpc.InferenceServiceBlockingStub inference() {
    return InferenceServiceGrpc.newBlockingStub(channel);
  }

  /** The stub of FeedbackService. */
  public FeedbackServiceGrpc.FeedbackServiceBlockingStub feedbackService() {
    return FeedbackServiceGrpc.newBlockingStub(channel);
  }

  /** The stub of SkillService. */
  public SkillServiceGrpc.SkillServiceBlockingStub skills() {
    return SkillServiceGrpc.newBlockingStub(channel);
  }

  /** The stub of ModelService. */
  public ModelServiceGrpc.ModelServiceBlockingStub models() {
    return ModelServiceGrpc.newBlockingStub(channel);
  }

  /** The stub of TrainingService. */
  public TrainingServiceGrpc.TrainingServiceBlockingStub training() {
    return TrainingServiceGrpc.newBlockingStub(channel);
  }

  /** The stub of StatsService. */
  public StatsServiceGrpc.StatsServiceBlockingStub stats() {
    return StatsServiceGrpc.newBlockingStub(channel);
  }

  /** The stub of EnsembleService. */
  public EnsembleServiceGrpc.EnsembleServiceBlockingStub ensembles() {
    return EnsembleServiceGrpc.newBlockingStub(channel);
  }

  /** The stub of AdminService. */
  public AdminServiceGrpc.AdminServiceBlockingStub admin() {
    return AdminServiceGrpc.newBlockingStub(channel);
  }

  /** The channel with our metadata and deadlines, for asynchronous stubs. */
  public Channel channel() {
    return channel;
  }

  /**
   * Calls a method of a stub, again where that is safe: {@code client.call(client.models(), stub ->
   * stub.listModels(request))}. A deadline of the stub goes before the client's.
   */
  public <S extends AbstractStub<S>, T> T call(S stub, Function<S, T> method) {
    Deadline given = stub.getCallOptions().getDeadline();
    Deadline end = given != null ? given : Deadline.after(options.timeout.toNanos(), TimeUnit.NANOSECONDS);
    S bound = stub.withDeadline(end);
    for (int attempt = 1; ; attempt++) {
      try {
        return method.apply(bound);
      } catch (StatusRuntimeException thrown) {
        UnderstudyException error = UnderstudyException.of(thrown);
        // Spread, so that those that were refused together do not come back together.
        long nanos = error.retryAfter().map(Duration::toNanos).orElse(0L);
        long wait = nanos + ThreadLocalRandom.current().nextLong(nanos / 4 + 1);
        if (!error.retryable() || attempt >= options.attempts || wait >= end.timeRemaining(TimeUnit.NANOSECONDS)) {
          throw error;
        }
        pause(wait);
      }
    }
  }

  /**
   * A vector for each text, in order, by the server's default model. Where an item has none its error is thrown; ask the
   * stub for models, sizes and the other items.
   */
  public List<float[]> embed(List<String> texts) {
    EmbedRequest request = EmbedRequest.newBuilder().addAllTexts(texts).build();
    List<float[]> vectors = new ArrayList<>(texts.size());
    for (EmbedResult result : call(inference(), stub -> stub.embed(request)).getResultsList()) {
      if (result.hasError()) {
        throw UnderstudyException.of(result.getError());
      }
      float[] vector = new float[result.getEmbeddingCount()];
      for (int i = 0; i < vector.length; i++) {
        vector[i] = result.getEmbedding(i);
      }
      vectors.add(vector);
    }
    return vectors;
  }

  /** A skill's answers with their route, cost, quality and interaction id; of an item that failed, its error is set. */
  public List<RunResult> run(String skill, List<String> texts) {
    RunRequest.Builder request = RunRequest.newBuilder().setSkill(skill);
    texts.forEach(text -> request.addInputs(RunInput.newBuilder().setText(text)));
    RunRequest built = request.build();
    return call(inference(), stub -> stub.run(built)).getResultsList();
  }

  /** An answer as it is written, within the client's timeout; all but the deltas is set in the last message alone. */
  public Generation generate(GenerateRequest request) {
    return generate(request, options.timeout);
  }

  /** An answer as it is written, within a time of its own. */
  public Generation generate(GenerateRequest request, Duration timeout) {
    Context.CancellableContext context = Context.current().withCancellation();
    Context before = context.attach();
    try {
      return new Generation(
          context, inference().withDeadlineAfter(timeout.toNanos(), TimeUnit.NANOSECONDS).generate(request));
    } finally {
      context.detach(before);
    }
  }

  /** Says something of an answer. It is kept once, however often it has to be sent. */
  public Feedback feedback(Feedback said) {
    String id = UUID.randomUUID().toString();
    CreateFeedbackRequest request = CreateFeedbackRequest.newBuilder().setFeedback(said).setRequestId(id).build();
    return call(feedbackService(), stub -> stub.createFeedback(request)).getFeedback();
  }

  /** Ends the connection and the calls on it. */
  @Override
  public void close() {
    connection.shutdownNow();
  }

  private static void pause(long nanos) {
    try {
      TimeUnit.NANOSECONDS.sleep(nanos);
    } catch (InterruptedException left) {
      Thread.currentThread().interrupt();
      throw UnderstudyException.of(
          Status.CANCELLED.withDescription("interrupted before another attempt").withCause(left).asRuntimeException());
    }
  }
}
