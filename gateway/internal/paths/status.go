package paths

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"

	"understudy.dev/gateway/internal/wireerr"
	pb "understudy.dev/gen/understudy/v1"
)

// capability is what the server can do for one task.
type capability struct {
	Task string `json:"task"`
	// Skills of this task by name: those that are configured, and the one of the task as such.
	Skills []string `json:"skills"`
	// Models in memory that do it.
	Models []string `json:"models"`
}

// capabilities lists the tasks with who can do them, the skills, the models in memory and the providers.
func (a *api) capabilities(ctx context.Context, _ *http.Request) (any, error) {
	state, err := a.stats.GetStatus(ctx, &pb.GetStatusRequest{})
	if err != nil {
		return nil, err
	}
	var skills []*pb.Skill
	request := &pb.ListSkillsRequest{PageSize: 1000}
	for {
		page, err := a.skills.ListSkills(ctx, request)
		if err != nil {
			return nil, err
		}
		skills = append(skills, page.Skills...)
		if request.PageToken = page.NextPageToken; request.PageToken == "" {
			break
		}
	}
	byTask := map[string]*capability{}
	of := func(task string) *capability {
		if byTask[task] == nil {
			byTask[task] = &capability{Task: task, Skills: []string{}, Models: []string{}}
		}
		return byTask[task]
	}
	skillNames := []string{}
	for _, skill := range skills {
		name := skill.Name[len("skills/"):]
		skillNames = append(skillNames, name)
		one := of(skill.Task)
		one.Skills = append(one.Skills, name)
	}
	models := []string{}
	for _, loaded := range state.Models {
		if name := loaded.GetModel().GetModelId(); !slices.Contains(models, name) {
			models = append(models, name)
			one := of(loaded.GetModel().GetTask())
			one.Models = append(one.Models, name)
		}
	}
	tasks := []*capability{}
	for _, one := range byTask {
		tasks = append(tasks, one)
	}
	slices.SortFunc(tasks, func(one, other *capability) int { return strings.Compare(one.Task, other.Task) })
	providers := []string{}
	for _, provider := range state.Providers {
		providers = append(providers, provider.Provider)
	}
	return object{
		"version": rawOf(state.ServerVersion), "tasks": rawOf(tasks), "skills": rawOf(skillNames), "models": rawOf(models),
		"providers": rawOf(providers),
	}, nil
}

// figures are what became of the items of skills since the server started.
func (a *api) figures(ctx context.Context, _ *http.Request) (any, error) {
	response, err := a.stats.GetStats(ctx, &pb.GetStatsRequest{})
	if err != nil {
		return nil, err
	}
	return flat(response)
}

// budget shows the limits and their use.
func (a *api) budget(ctx context.Context, r *http.Request) (any, error) {
	response, err := a.stats.GetBudget(ctx, &pb.GetBudgetRequest{Scope: r.URL.Query().Get("scope")})
	if err != nil {
		return nil, err
	}
	answer, err := flat(response)
	if err != nil {
		return nil, err
	}
	worst := pb.BudgetState_BUDGET_STATE_OK
	for _, one := range response.Budgets {
		worst = max(worst, one.State)
	}
	answer["status"] = rawOf(word(worst.String(), "BUDGET_STATE_"))
	return answer, nil
}

// healthy tells whether the server answers; it needs no key.
func (a *api) healthy(ctx context.Context, _ *http.Request) (any, error) {
	response, err := a.health.Check(ctx, &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		return nil, err
	}
	if response.Status != grpc_health_v1.HealthCheckResponse_SERVING {
		return nil, wireerr.New(http.StatusServiceUnavailable, codes.Unavailable, "NOT_SERVING", "the server is not serving: it is starting or stopping, or no model is loaded", "Ask again in a moment; GET /api/models/status shows the models.")
	}
	return object{"status": rawOf("ok")}, nil
}
