package paths

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"

	"google.golang.org/protobuf/proto"
	pb "understudy.dev/gen/understudy/v1"
)

// createJob queues a training job. Kinds and methods may be written in lower case and with underscores: "train", "linear_head".
func (a *api) createJob(ctx context.Context, r *http.Request) (any, error) {
	b, err := readBody(r)
	if err != nil {
		return nil, err
	}
	skill, err := b.text("skill", "skill_name", "skill_id")
	if err != nil {
		return nil, err
	}
	if skill == "" {
		return nil, invalid("skill", "nothing says what is to be learnt; expected `skill`, for example {\"skill\": \"support-intent\"}")
	}
	kind, err := b.text("kind", "type", "job_type")
	if err != nil {
		return nil, err
	}
	method, err := b.text("method", "training_method")
	if err != nil {
		return nil, err
	}
	request := &pb.CreateTrainingJobRequest{TrainingJob: &pb.TrainingJob{}}
	if request.RequestId, err = b.text("request_id"); err != nil {
		return nil, err
	}
	if err := b.into(request.TrainingJob, "request_id", "skill_name", "type", "training_method"); err != nil {
		return nil, err
	}
	request.TrainingJob.Skill = "skills/" + strings.TrimPrefix(skill, "skills/")
	request.TrainingJob.Method = strings.ReplaceAll(method, "_", "-")
	if request.TrainingJob.Kind, err = kindOf(kind); err != nil {
		return nil, err
	}
	response, err := a.training.CreateTrainingJob(ctx, request)
	if err != nil {
		return nil, err
	}
	return jobAnswer(response.GetTrainingJob())
}

func kindOf(kind string) (pb.TrainingJobKind, error) {
	if kind == "" {
		return pb.TrainingJobKind_TRAINING_JOB_KIND_UNSPECIFIED, nil
	}
	name := strings.TrimPrefix(strings.ToUpper(strings.ReplaceAll(kind, "-", "")), "TRAINING_JOB_KIND_")
	value, ok := pb.TrainingJobKind_value["TRAINING_JOB_KIND_"+strings.ReplaceAll(name, "FINE_TUNE", "FINETUNE")]
	if !ok {
		return 0, invalid("kind", "there is no kind of job %q; expected \"train\", \"assess\" or \"finetune\"", kind)
	}
	return pb.TrainingJobKind(value), nil
}

// jobName reads the path's {id}: with or without "trainingJobs/" it means the same, but a path holds one segment of it.
func jobName(r *http.Request) string { return "trainingJobs/" + r.PathValue("id") }

func (a *api) getJob(ctx context.Context, r *http.Request) (any, error) {
	response, err := a.training.GetTrainingJob(ctx, &pb.GetTrainingJobRequest{Name: jobName(r)})
	if err != nil {
		return nil, err
	}
	return jobAnswer(response.GetTrainingJob())
}

// cancelJob ends a job; the record of it stays.
func (a *api) cancelJob(ctx context.Context, r *http.Request) (any, error) {
	response, err := a.training.CancelTrainingJob(ctx, &pb.CancelTrainingJobRequest{Name: jobName(r)})
	if err != nil {
		return nil, err
	}
	return jobAnswer(response.GetTrainingJob())
}

func jobAnswer(job *pb.TrainingJob) (any, error) {
	shown, err := flat(job)
	if err != nil {
		return nil, err
	}
	id := strings.TrimPrefix(job.GetName(), "trainingJobs/")
	return object{"id": rawOf(id), "status": rawOf(word(job.GetState().String(), "TRAINING_JOB_STATE_")), "job": rawOf(shown)}, nil
}

// jobLogs gives the lines that are there now.
func (a *api) jobLogs(ctx context.Context, r *http.Request) (any, error) {
	request := &pb.StreamTrainingJobLogsRequest{Name: jobName(r), NoFollow: true}
	if err := queryInt(r, "after", &request.After); err != nil {
		return nil, err
	}
	stream, err := a.training.StreamTrainingJobLogs(ctx, request)
	if err != nil {
		return nil, err
	}
	all := &pb.StreamTrainingJobLogsResponse{}
	for {
		part, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		state := part.State
		proto.Merge(all, part)
		all.State = state
	}
	answer, err := flat(all)
	if err != nil {
		return nil, err
	}
	answer["id"] = rawOf(r.PathValue("id"))
	answer["status"] = rawOf(word(all.State.String(), "TRAINING_JOB_STATE_"))
	delete(answer, "state")
	return answer, nil
}
