package dev.understudy.example;

import dev.understudy.Client;
import dev.understudy.Generation;
import dev.understudy.UnderstudyException;
import dev.understudy.v1.EmbedRequest;
import dev.understudy.v1.Feedback;
import dev.understudy.v1.GenerateRequest;
import dev.understudy.v1.GenerateTextRequest;
import dev.understudy.v1.GenerationDelta;
import dev.understudy.v1.ModelSelector;
import dev.understudy.v1.RunResult;
import dev.understudy.v1.Sampling;
import dev.understudy.v1.Thumb;
import io.grpc.Status;
import java.util.List;
import java.util.concurrent.TimeUnit;

/**
 * Every kind of call: {@code mvn -q test-compile exec:java}, with UNDERSTUDY_ADDRESS and UNDERSTUDY_API_KEY where they are
 * not the defaults.
 */
public final class Tour {
  private Tour() {}

  public static void main(String[] arguments) {
    String address = System.getenv().getOrDefault("UNDERSTUDY_ADDRESS", "127.0.0.1:50051");
    try (Client client = Client.builder(address).apiKey(System.getenv("UNDERSTUDY_API_KEY")).connect()) {
      List<float[]> vectors =
          client.embed(List.of("where is my card ?", "how do i reset my password ?", "money transfer late"));
      System.out.println(vectors.size() + " vectors of " + vectors.get(0).length);

      Sampling greedy = Sampling.newBuilder().setTemperature(0).setMaxTokens(12).build();
      GenerateRequest request = GenerateRequest.newBuilder().setPrompt("tell").setSampling(greedy).build();
      try (Generation answer = client.generate(request)) {
        for (var response : answer) {
          response.getDeltasList().stream().map(GenerationDelta::getText).forEach(System.out::print);
        }
      }
      System.out.println();

      RunResult answer = client.run("text-classification", List.of("where is my card ?")).get(0);
      if (answer.hasError()) {
        throw UnderstudyException.of(answer.getError());
      }
      System.out.println(answer.getOutputText() + ", by " + answer.getDecision().getCandidate());
      Feedback said =
          Feedback.newBuilder().setInteractionId(answer.getInteractionId()).setThumb(Thumb.THUMB_UP).build();
      System.out.println("feedback " + client.feedback(said).getFeedbackId());

      failures(client);
    }
  }

  private static void failures(Client client) {
    ModelSelector nobody = ModelSelector.newBuilder().setName("nobody").build();
    EmbedRequest wrong = EmbedRequest.newBuilder().setModel(nobody).addTexts("x").build();
    try {
      client.call(client.inference(), stub -> stub.embed(wrong));
    } catch (UnderstudyException error) {
      if (error.code() == Status.Code.NOT_FOUND) {
        System.out.println(error.reason() + " " + error.metadata().get("model")); // MODEL_NOT_FOUND nobody
      }
    }

    Sampling endless = Sampling.newBuilder().setIgnoreEos(true).build();
    GenerateTextRequest slow = GenerateTextRequest.newBuilder().setPrompt("tell").setSampling(endless).build();
    try {
      client.call(client.inference().withDeadlineAfter(50, TimeUnit.MILLISECONDS), stub -> stub.generateText(slow));
    } catch (UnderstudyException error) {
      if (error.code() == Status.Code.DEADLINE_EXCEEDED) {
        System.out.println(error.reason() + " in the stage " + error.metadata().get("stage"));
      }
    }
  }
}
