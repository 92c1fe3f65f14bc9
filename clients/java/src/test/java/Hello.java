import dev.understudy.Client;
import dev.understudy.UnderstudyException;
import java.util.List;

public class Hello {
  public static void main(String[] arguments) {
    try (Client client = Client.connect("127.0.0.1:50051")) {
      List<float[]> vectors = client.embed(List.of("Where is my card?", "I lost my wallet"));
      System.out.println(vectors.size() + " vectors of " + vectors.get(0).length);
    } catch (UnderstudyException error) {
      System.err.println(error.code() + " " + error.reason() + ": " + error.getMessage());
    }
  }
}
