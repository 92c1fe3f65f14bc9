package dev.understudy;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import com.google.protobuf.ListValue;
import com.google.protobuf.Struct;
import com.google.protobuf.Value;
import com.google.protobuf.util.JsonFormat;
import dev.understudy.v1.ClassifyInput;
import dev.understudy.v1.ClassifyRequest;
import dev.understudy.v1.EmbedRequest;
import dev.understudy.v1.EmbedResponse;
import dev.understudy.v1.Feedback;
import dev.understudy.v1.GenerateRequest;
import dev.understudy.v1.GenerateResponse;
import dev.understudy.v1.GenerationDelta;
import dev.understudy.v1.Label;
import dev.understudy.v1.ModelSelector;
import dev.understudy.v1.RunResult;
import dev.understudy.v1.Sampling;
import dev.understudy.v1.Thumb;
import io.grpc.Status;
import io.grpc.TlsChannelCredentials;
import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.time.Duration;
import java.util.List;
import java.util.concurrent.TimeUnit;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

/** Against the servers that pytest starts, see tests/clients/test_languages.py: what Python was answered is what we must get. */
final class ClientTest {
  private static final Sampling ENDLESS = Sampling.newBuilder().setTemperature(0).setIgnoreEos(true).build();
  private static final ModelSelector NOBODY = ModelSelector.newBuilder().setName("nobody").build();

  private Client client;

  @AfterEach
  void close() {
    if (client != null) {
      client.close();
    }
  }

  @Test
  void embeddingsAreThoseOfPython() {
    Struct expected = server();
    List<float[]> vectors = client.embed(texts(expected, "texts"));
    List<Value> wanted = list(expected, "embeddings");
    assertEquals(wanted.size(), vectors.size());
    for (int i = 0; i < wanted.size(); i++) {
      List<Value> row = wanted.get(i).getListValue().getValuesList();
      assertEquals(row.size(), vectors.get(i).length);
      for (int j = 0; j < row.size(); j++) {
        assertEquals(row.get(j).getNumberValue(), vectors.get(i)[j], 1e-6);
      }
    }
  }

  @Test
  void classesAreThoseOfPython() {
    Struct expected = server();
    ClassifyRequest.Builder request = ClassifyRequest.newBuilder();
    texts(expected, "texts").forEach(text -> request.addInputs(ClassifyInput.newBuilder().setText(text)));
    var results = client.call(client.inference(), stub -> stub.classify(request.build())).getResultsList();
    for (int i = 0; i < results.size(); i++) {
      List<Value> wanted = list(expected, "labels").get(i).getListValue().getValuesList();
      List<Label> labels = results.get(i).getLabelsList();
      assertEquals(wanted.size(), labels.size());
      for (int j = 0; j < wanted.size(); j++) {
        ListValue one = wanted.get(j).getListValue();
        assertEquals(one.getValues(0).getStringValue(), labels.get(j).getName());
        assertEquals(one.getValues(1).getNumberValue(), labels.get(j).getScore(), 1e-6);
      }
    }
  }

  @Test
  void aSkillAnswersAndTakesFeedback() {
    Struct expected = server();
    List<RunResult> results = client.run(text(expected, "skill"), texts(expected, "texts"));
    assertEquals(texts(expected, "answers"), results.stream().map(RunResult::getOutputText).toList());
    assertTrue(results.stream().allMatch(one -> one.getDecision().getLocal()));
    String id = results.get(0).getInteractionId();
    Feedback said =
        Feedback.newBuilder().setInteractionId(id).setThumb(Thumb.THUMB_UP).setComment("from Java").build();
    Feedback kept = client.feedback(said);
    assertFalse(kept.getFeedbackId().isEmpty());
    assertEquals("from Java", kept.getComment());
  }

  @Test
  void aStreamIsTheWholeTextOfTheSameSeed() {
    Struct expected = server();
    Struct given = expected.getFieldsOrThrow("sampling").getStructValue();
    int most = (int) given.getFieldsOrThrow("max_tokens").getNumberValue();
    Sampling sampling =
        Sampling.newBuilder()
            .setTemperature((float) given.getFieldsOrThrow("temperature").getNumberValue())
            .setSeed((long) given.getFieldsOrThrow("seed").getNumberValue())
            .setMaxTokens(most)
            .build();
    ModelSelector model = ModelSelector.newBuilder().setName(text(expected, "model")).build();
    StringBuilder text = new StringBuilder();
    GenerateResponse last = null;
    try (Generation generation = client.generate(prompt(text(expected, "prompt"), sampling).setModel(model).build())) {
      for (GenerateResponse response : generation) {
        response.getDeltasList().stream().map(GenerationDelta::getText).forEach(text::append);
        last = response;
      }
    }
    assertEquals(text(expected, "text"), text.toString());
    assertEquals(most, last.getUsage().getOutputTokens());
    assertEquals(text(expected, "model"), last.getModel().getName());
  }

  @Test
  void anUnknownModelHasItsReason() {
    server();
    EmbedRequest request = EmbedRequest.newBuilder().setModel(NOBODY).addTexts("x").build();
    UnderstudyException error = failure(() -> client.call(client.inference(), stub -> stub.embed(request)));
    assertEquals(Status.Code.NOT_FOUND, error.code());
    assertEquals("MODEL_NOT_FOUND", error.reason());
    assertEquals("nobody", error.metadata().get("model"));
    assertFalse(error.requestId().isEmpty());
    assertTrue(error.toString().contains("NOT_FOUND (MODEL_NOT_FOUND)"));
    GenerateRequest streamed = prompt("x", Sampling.getDefaultInstance()).setModel(NOBODY).build();
    assertEquals("MODEL_NOT_FOUND", failure(() -> drain(streamed, Duration.ofSeconds(10))).reason());
    UnderstudyException item = failure(() -> client.embed(List.of("fine", "")));
    assertEquals(Status.Code.INVALID_ARGUMENT, item.code());
    assertEquals("INVALID_ARGUMENT", item.reason());
  }

  @Test
  void aDeadlineSaysWhere() {
    server();
    UnderstudyException error = failure(() -> drain(prompt("tell", ENDLESS).build(), Duration.ofMillis(200)));
    assertEquals(Status.Code.DEADLINE_EXCEEDED, error.code());
    assertEquals("DEADLINE_EXCEEDED", error.reason());
    assertFalse(error.metadata().get("stage").isEmpty());
    var hasty = client.inference().withDeadlineAfter(1, TimeUnit.MICROSECONDS);
    EmbedRequest request = EmbedRequest.newBuilder().addTexts("x").build();
    UnderstudyException early = failure(() -> client.call(hasty, stub -> stub.embed(request)));
    assertEquals("DEADLINE_EXCEEDED", early.reason());
    assertEquals("client", early.metadata().get("stage"));
  }

  @Test
  void leavingAStreamEndsIt() {
    server();
    // More than run at once: places that were not freed would keep the later ones from starting for 2,000 tokens each.
    for (int i = 0; i < 12; i++) {
      try (Generation generation = client.generate(prompt("tell", ENDLESS).build())) {
        for (GenerateResponse response : generation) {
          if (response.getDeltasCount() > 0) {
            break;
          }
        }
      }
    }
    Generation left = client.generate(prompt("tell", ENDLESS).build());
    UnderstudyException error = failure(() -> left.forEach(response -> left.close()));
    assertEquals(Status.Code.CANCELLED, error.code());
    assertEquals("CANCELLED", error.reason());
  }

  @Test
  void keyMetadataAndDeadlineGoWithEveryCall() {
    client = Client.builder(setting("UNDERSTUDY_SCRIPTED")).apiKey("und_a_b").metadata("x-request-id", "java-1").connect();
    EmbedRequest request = EmbedRequest.newBuilder().addTexts("ok:java").build();
    EmbedResponse response = client.inference().embed(request);
    assertEquals("Bearer und_a_b", response.getModel().getName());
    assertEquals("java-1", response.getModel().getVersion());
    long left = response.getUsage().getInputTokens();
    assertTrue(left > 30_000 && left <= 60_000, left + " ms of 60 s were left");
  }

  @Test
  void aCallWithoutAKeyIsRefused() {
    setting("UNDERSTUDY_API_KEY");
    client = Client.connect(setting("UNDERSTUDY_ADDRESS"));
    UnderstudyException error = failure(() -> client.embed(List.of("x")));
    assertEquals(Status.Code.UNAUTHENTICATED, error.code());
    assertEquals("UNAUTHENTICATED", error.reason());
  }

  @Test
  void encryption() throws IOException {
    String address = setting("UNDERSTUDY_SCRIPTED_TLS");
    var authorities = TlsChannelCredentials.newBuilder().trustManager(new File(setting("UNDERSTUDY_CA"))).build();
    client = Client.builder(address).tls(authorities).connect();
    assertEquals(1, client.embed(List.of("ok:java-tls")).size());
    try (Client stranger = Client.builder(address).tls(TlsChannelCredentials.create()).connect()) {
      assertEquals(Status.Code.UNAVAILABLE, failure(() -> stranger.embed(List.of("ok:java-tls"))).code());
    }
  }

  @ParameterizedTest
  @ValueSource(strings = {"again", "full"})
  void isSentAgainUntilAnswered(String what) {
    client = Client.connect(setting("UNDERSTUDY_SCRIPTED"));
    assertEquals(what.equals("again") ? 3 : 2, client.embed(List.of(what + ":" + name(what))).get(0)[0]);
  }

  @ParameterizedTest
  @ValueSource(strings = {"plain", "paid", "later"})
  void isSentOnce(String what) {
    client = Client.connect(setting("UNDERSTUDY_SCRIPTED"));
    UnderstudyException error = failure(() -> client.embed(List.of(what + ":" + name(what))));
    assertEquals(Status.Code.UNAVAILABLE, error.code());
    assertEquals("scripted", error.metadata().get("model"));
    assertEquals(2, client.embed(List.of("ok:" + name(what))).get(0)[0]);
  }

  @Test
  void feedbackHasAnIdByWhichItIsKeptOnce() {
    client = Client.connect(setting("UNDERSTUDY_SCRIPTED"));
    assertEquals(36, client.feedback(Feedback.newBuilder().setInteractionId("one").build()).getFeedbackId().length());
  }

  private Struct server() {
    client = Client.builder(setting("UNDERSTUDY_ADDRESS")).apiKey(System.getenv("UNDERSTUDY_API_KEY")).connect();
    Struct.Builder expected = Struct.newBuilder();
    try {
      JsonFormat.parser().merge(Files.readString(Path.of(setting("UNDERSTUDY_EXPECTED"))), expected);
    } catch (IOException broken) {
      throw new AssertionError(broken);
    }
    return expected.build();
  }

  private void drain(GenerateRequest request, Duration timeout) {
    try (Generation generation = client.generate(request, timeout)) {
      generation.forEach(response -> {});
    }
  }

  private static UnderstudyException failure(Runnable work) {
    return assertThrows(UnderstudyException.class, work::run);
  }

  private static GenerateRequest.Builder prompt(String text, Sampling sampling) {
    return GenerateRequest.newBuilder().setPrompt(text).setSampling(sampling);
  }

  private static String setting(String name) {
    String value = System.getenv(name);
    assumeTrue(value != null, name + " is not set; pytest sets it");
    return value;
  }

  private static String name(String what) {
    return "java-" + what + "-" + ProcessHandle.current().pid();
  }

  private static List<Value> list(Struct struct, String name) {
    return struct.getFieldsOrThrow(name).getListValue().getValuesList();
  }

  private static String text(Struct struct, String name) {
    return struct.getFieldsOrThrow(name).getStringValue();
  }

  private static List<String> texts(Struct struct, String name) {
    return list(struct, name).stream().map(Value::getStringValue).toList();
  }
}
